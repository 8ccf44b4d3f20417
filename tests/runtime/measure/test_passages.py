"""Passages: which tokens count and how much; keys where they should be; texts that are too short."""

import math
import pydoc_data.topics

import pytest
import ropewalk
from ropewalk import UserError
from ropewalk.runtime.measure.passages import Text, digest, make_passages, parse_objective, split_texts
from ropewalk.runtime.measure.passkey import OPENING, plant_key

TEXT = "\n\n".join(pydoc_data.topics.topics.values())


@pytest.fixture(scope="module")
def vocab(smollm2):
    llm = ropewalk.Llama(smollm2, vocab_only=True, verbose=False)
    yield llm
    llm.close()


def test_objectives_are_names_or_mixes():
    assert parse_objective("tail") == {"tail": 1.0}
    assert parse_objective("tail+0.5*needle") == pytest.approx({"tail": 2 / 3, "needle": 1 / 3})
    for wrong in ("", "tails", "0*tail", "tail+tail", "x*tail", "-1*all", "nan*all", "inf*tail", "tail+"):
        with pytest.raises(UserError, match="objective:"):
            parse_objective(wrong)


def test_each_objective_scores_its_tokens(vocab):
    def one(objective):
        (passage,) = make_passages(vocab, [Text("doc", TEXT)], 400, 1, objective, 256)
        assert len(passage.tokens) <= 400 and math.isclose(sum(passage.weights), 1)
        return passage

    n_bos = len(vocab.tokenize(b"", add_bos=True))
    tail, everything, needle, mix = map(one, ("tail", "all", "needle", "3*tail+needle"))
    assert tail.targets == tuple(range(256, 400)) and everything.targets == tuple(range(1, 400))
    digits = vocab.detokenize([needle.tokens[i] for i in needle.targets]).decode()
    assert digits.strip().isdigit() and len(digits.strip()) == 5 and len(needle.tokens) == 400 == n_bos + 400 - n_bos
    assert vocab.detokenize(list(needle.tokens)).decode().count(f"{OPENING} {digits.strip()}") == 3
    weights = dict(zip(mix.targets, mix.weights, strict=True))
    assert math.isclose(sum(weights[i] for i in needle.targets), 0.25)
    assert mix.targets[0] == 256
    assert [(part.kind, part.share) for part in mix.parts] == [("tail", 0.75), ("needle", 0.25)]
    assert all(math.isclose(sum(part.weights), 1) for part in mix.parts)
    for i, weight in enumerate(mix.weights):
        assert weight == pytest.approx(sum(part.share * part.weights[i] for part in mix.parts))


def test_in_the_last_window_each_part_keeps_its_share(vocab):
    """Digits are at the end: if all weights were scaled alike, they would dominate a short window."""
    (passage,) = make_passages(vocab, [Text("doc", TEXT)], 400, 1, "tail+0.25*needle", 256)
    window = passage.last(50)
    assert window.targets[0] == 351 and math.isclose(sum(window.weights), 1)
    digits = {at for at, weight in zip(passage.targets, passage.parts[1].weights, strict=True) if weight}
    assert len(digits) == 5 and digits < set(window.targets)
    of_digits = [w for at, w in zip(window.targets, window.weights, strict=True) if at in digits]
    assert sum(of_digits) == pytest.approx(0.2) and len({round(w, 12) for w in window.weights}) == 2
    (tail,) = make_passages(vocab, [Text("doc", TEXT)], 400, 1, "tail", 256)
    assert tail.last(50).weights == pytest.approx([1 / 49] * 49)
    assert {round(w, 12) for w in window.last(3).weights} == {round(1 / 2, 12)}  # only digits are left
    with pytest.raises(UserError, match="nothing to predict"):
        passage.last(0)


def test_passages_are_spread_and_do_not_overlap(vocab):
    passages = make_passages(vocab, [Text("a", TEXT), Text("b", TEXT[50_000:])], 300, 5, "all", 256)
    assert [p.name for p in passages] == ["a (1 of 3)", "a (2 of 3)", "a (3 of 3)", "b (1 of 2)", "b (2 of 2)"]
    assert len({p.tokens for p in passages}) == 5
    assert digest(passages) == digest(passages) != digest(passages[:4])


def test_shorter_texts_give_what_they_hold(vocab):
    short = vocab.detokenize(vocab.tokenize(TEXT.encode(), add_bos=False)[:350]).decode()
    texts = [Text("short", short), Text("none", short[:100]), Text("long", TEXT)]
    names = [p.name for p in make_passages(vocab, texts, 300, 4, "all", 256)]
    assert names == ["short", "long (1 of 3)", "long (2 of 3)", "long (3 of 3)"]
    with pytest.raises(UserError, match=r"2 texts, the longest short: 3\d\d tokens, 2\d\d too few for 2 passages of"):
        make_passages(vocab, texts[:2], 300, 2, "all", 256)


def test_a_text_that_is_too_short_is_reported_with_what_is_missing(vocab):
    short = vocab.detokenize(vocab.tokenize(TEXT.encode(), add_bos=False)[:290]).decode()
    with pytest.raises(UserError, match=r"doc: 29\d tokens, 3\d\d too few for 2 passages of"):
        make_passages(vocab, [Text("doc", short)], 300, 2, "all", 100)
    with pytest.raises(UserError, match="none past the original"):
        make_passages(vocab, [Text("doc", TEXT)], 256, 1, "tail", 256)


def test_a_key_is_planted_at_its_depth(vocab):
    tokens = vocab.tokenize(TEXT.encode(), add_bos=False)[:500]
    for depth in (0.0, 0.25, 1.0):
        planted = plant_key(vocab, tokens, "40917", depth)
        assert len(planted.tokens) == 500
        assert vocab.detokenize(list(planted.digits)).decode().strip() == "40917"
        at = planted.body.index(OPENING) / len(planted.body)
        assert abs(at - depth * 0.94) < 0.1
    with pytest.raises(UserError, match="expected more than"):
        plant_key(vocab, tokens[:20], "40917", 0.5)


def test_held_out_texts_are_never_searched():
    texts = [Text(str(i), f"{i}") for i in range(7)]
    search, held = split_texts(texts, seed=3)
    assert len(held) == 2 and sorted(t.name for t in [*search, *held]) == [t.name for t in texts]
    assert split_texts(texts, seed=3) == (search, held) != split_texts(texts, seed=4)
    (first,), (second,) = split_texts([Text("one", "a" * 400 + "\n\n" + "b" * 500)])
    assert first.text == "a" * 400 and second.text.strip() == "b" * 500
