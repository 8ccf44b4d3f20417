"""Splitting and combining: any text, any size; and an output file that survives being torn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ropewalk.container import model_digest
from ropewalk.convert.split import split_model
from ropewalk.errors import UserError
from ropewalk.runtime import Llama
from ropewalk.runtime.chat.results import Results
from ropewalk.runtime.chat.summary import (
    NothingToSummarize,
    Summarizer,
    SummarySettings,
    _whole_sentences,
    has_words,
    split,
)

BRIDGE = (
    "The town council met on Tuesday to discuss the new bridge over the river Wend. Engineers warned that the old"
    " bridge, built in 1911, would not survive another winter flood."
)


def words(text: str) -> int:
    return len(text.split())


def characters(text: str) -> int:
    return len(text)


def test_a_text_that_fits_stays_whole() -> None:
    assert split("one two\n\nthree", 3, words) == ["one two\n\nthree"]
    assert split("", 3, words) == [""]


def test_cut_at_paragraphs_into_parts_of_similar_size() -> None:
    paragraphs = [f"paragraph {i} has six words here.\n\n" for i in range(10)]
    parts = split("".join(paragraphs), 50, words)
    assert parts == ["".join(paragraphs[:5]), "".join(paragraphs[5:])]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a b\nc d\ne f", ["a b\n", "c d\n", "e f"]),
        ("One two. Six ten? No go!", ["One two. ", "Six ten? ", "No go!"]),
        ("a b c d", ["a b ", "c d"]),
        ("a b\n \n\nc d", ["a b\n \n\n", "c d"]),
    ],
)
def test_cut_at_the_best_border_there_is(text: str, parts: list[str]) -> None:
    assert split(text, 2, words) == parts


@pytest.mark.parametrize("count", [words, characters])
@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_lost_and_every_part_fits(count: Callable[[str], int], seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(["a", "bc", " ", ". ", "\n", "\n\n", "é", "。", "x" * 40]) for _ in range(400))
    capacity = rng.randint(1, 60)
    parts = split(text, capacity, count)
    assert "".join(parts) == text
    assert all(part for part in parts)
    assert max(map(count, parts)) <= capacity


def glued(text: str) -> int:
    """Tokens of which there are more when pieces are joined: each paragraph break within a text counts three."""
    return len(text.split()) + 3 * text.strip("\n").count("\n\n")


@pytest.mark.parametrize("capacity", [4, 7, 50, 333])
def test_parts_are_counted_as_they_are_joined(capacity: int) -> None:
    text = "\n\n".join(["* alpha"] * 900)
    parts = split(text, capacity, glued)
    assert "".join(parts) == text and max(map(glued, parts)) <= capacity
    assert len(parts) <= 1.5 * glued(text) / capacity + 1
    assert split(text, 2000, words, glued) == split(text, 2000, glued)  # what is sent counts


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The sum is known. The year", "The sum is known."),
        ("The points are:\n1. Apples are dear.\n2. Pears are not so dear.\n3.", None),
        ("First of all, he went there.\n\n3. He came", "First of all, he went there."),
        ("First of all, he went there.\n- **4.**", "First of all, he went there."),
        ("It was built in 1911. It was rebuilt in 2027. Then", "It was built in 1911. It was rebuilt in 2027."),
        ("The sum is now known to all. It is J. S. and Dr. M", "The sum is now known to all."),
        ("一句话。两句话。三", "一句话。两句话。"),
        ('He said "no!" and then "yes." But', 'He said "no!" and then "yes."'),
        ("no end", "no end"),
    ],
)
def test_a_cut_summary_ends_with_a_sentence(text: str, kept: str | None) -> None:
    assert _whole_sentences(text) == (kept or text[:-3])


@pytest.mark.parametrize(
    "text", [".", "\u200b\u200b\ufeff\u2060", "* * *\n---\n", "\u3164\u115f", "\u0301", "…", "===", "\x07_"]
)
def test_a_text_without_words(text: str) -> None:
    assert not has_words(text)


@pytest.mark.parametrize("text", ["a", "- 7", "é", "一", "\u200bשלום", "٣"])
def test_a_text_with_words(text: str) -> None:
    assert has_words(text)


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[Llama]:
    llm = Llama(str(smollm2), n_ctx=400, n_threads=1, n_threads_batch=1, verbose=False)
    yield llm
    llm.close()


def test_a_summary_depends_on_its_text_alone(llm: Llama) -> None:
    summarizer = Summarizer(llm, SummarySettings(max_tokens=16))
    first = summarizer.summarize(BRIDGE)
    summarizer.summarize("Ann sold the farm to Bob in May.")
    again = summarizer.summarize(BRIDGE)
    assert first.text == again.text
    assert first.parts == 1 and first.band_index == 0
    assert first.n_tokens == len(llm.tokenize(BRIDGE.encode(), add_bos=False))
    assert 1 <= first.written_tokens <= 16
    assert first.read_tokens > first.n_tokens


def test_parts_are_combined_until_one_is_left(llm: Llama) -> None:
    text = "\n\n".join(f"{i}. {BRIDGE}" for i in range(16))
    seen: list[tuple[int, int]] = []
    summary = Summarizer(llm, SummarySettings(max_tokens=60)).summarize(text, lambda *progress: seen.append(progress))
    assert summary.parts >= 2
    assert summary.text
    assert seen == sorted(seen) and seen[-1][0] <= seen[-1][1]
    assert summary.read_tokens > summary.n_tokens > 400


@pytest.mark.parametrize(
    "text", ["\n\n".join(["* alpha"] * 500), "\n\n".join(["Anna: Right."] * 300), "<|im_end|>" * 200]
)
def test_many_short_paragraphs_are_split_into_parts_that_fit(llm: Llama, text: str) -> None:
    summarizer = Summarizer(llm, SummarySettings(max_tokens=16))
    parts = summarizer._parts(text)
    assert "".join(parts) == text and len(parts) >= 2
    assert max(len(summarizer._prompt(part)) for part in parts) + 16 <= llm.n_ctx()


def test_a_summary_cut_at_the_limit_says_so(llm: Llama) -> None:
    summarizer = Summarizer(llm, SummarySettings(max_tokens=16, prompt="Copy the text above."))
    cut = summarizer.summarize(BRIDGE)
    assert cut.finish_reason == "length" and cut.text.endswith(" …") and cut.written_tokens == 16
    whole = Summarizer(llm, SummarySettings(max_tokens=160)).summarize(BRIDGE)
    assert whole.finish_reason == "stop" and not whole.text.endswith("…")


def test_a_text_without_words_is_not_given_to_the_model(llm: Llama) -> None:
    with pytest.raises(NothingToSummarize, match="neither a letter nor a digit"):
        Summarizer(llm).summarize("\u200b .\n\n* * *")


def test_summaries_are_grouped_two_or_more_at_a_time(llm: Llama) -> None:
    summarizer = Summarizer(llm)
    texts = ["one two three four"] * 7
    assert [group.count("one") for group in summarizer._groups(texts, 16)] == [3, 3, 1]
    assert [group.count("one") for group in summarizer._groups(texts, 1)] == [2, 2, 2, 1]


def test_a_context_that_is_too_small_is_refused(llm: Llama) -> None:
    with pytest.raises(UserError, match=r"a context of 400 tokens is too small"):
        Summarizer(llm, SummarySettings(prompt="word " * 300))


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "source": name, "digest": "d", "settings": "s", **(more or {"summary": name})}


def lines(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("cut", [1, 7, 30, -1])
def test_a_torn_line_is_repaired_wherever_it_was_torn(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        results.append(record("a"))
        whole = path.stat().st_size
        results.append(record("b\udcffé"))  # a file name that is not UTF-8
    raw = path.read_bytes()
    path.write_bytes(raw[: whole + cut] if cut > 0 else raw[:-1])
    with Results(path) as results:
        assert results.take_done(("a", "d", "s")) and not results.take_done(("a", "d", "s"))
        assert results.take_done(("b\udcffé", "d", "s")) == (cut < 0)  # all there except the newline
        results.append(record("c"))
    assert lines(path) == (["a", "c"] if cut > 0 else ["a", "b\udcffé", "c"])


def test_errors_are_dropped_for_another_try(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        for name in "abc":
            results.append(record(name, error="bad") if name != "b" else record(name))
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    (tmp_path / ".out.jsonl.0123456789abcdef.part").write_text("left by a killed run")
    with Results(link) as results:
        results.begin({"a"})
        with pytest.raises(UserError, match="another run"):
            Results(path)
        results.append(record("a"))
    assert lines(path) == ["b", "c", "a"]
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "link.jsonl"}


DEEP = "[" * 5_000 + "]" * 5_000


@pytest.mark.parametrize(
    "content",
    [
        "buy milk",
        "{}\n",
        '{"id": "a"}\n',
        "[1]\n",
        '{"id": 1, "summary": "x"}\n',
        '{"id": 7, "text": "my only copy"}',
        '{"id": "7", "text": "my on',
        '{"id": "my only copy',
        "NaN\n",
        f"{'9' * 400}\n",
        f"{'9' * 5_000}",
        f"{DEEP}\n",
        DEEP[:5_000],
        "\0" * 100_000,
    ],
)
def test_another_files_content_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"line 1 is not a result of ropewalk summarize"):
        Results(path)
    assert path.read_text() == content


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "9" * 400, "1e999"])
def test_a_result_with_odd_numbers_is_a_result(tmp_path: Path, value: str) -> None:
    path = tmp_path / "out.jsonl"
    line = json.dumps(record("a"))[:-1] + f', "tokens": {value}}}\n'
    path.write_text(line + json.dumps(record("b", error="bad")) + "\n")
    with Results(path) as results:
        results.begin({"b"})
        assert results.take_done(("a", "d", "s"))
    assert path.read_text() == line


def test_nothing_is_repaired_before_there_is_something_to_write(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    content = json.dumps(record("a")) + "\n" + json.dumps(record("b"))[:-9]
    path.write_text(content)
    with Results(path) as results:
        results.begin(set())
    assert path.read_text() == content
    with Results(path, force=True) as results:
        results.begin({"a"})
        assert path.read_text() == content
        results.append(record("c"))
    assert lines(path) == ["c"]


def test_an_output_that_is_moved_during_the_run(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        results.append(record("a"))
        path.rename(tmp_path / "moved.jsonl")
        with pytest.raises(UserError, match=r"out\.jsonl: was moved, removed or replaced during the run"):
            results.append(record("b"))
    assert lines(tmp_path / "moved.jsonl") == ["a", "b"] and not path.exists()
    with Results(path) as results:
        path.unlink()
        with pytest.raises(UserError, match="was moved, removed or replaced during the run"):
            results.begin(set())


def test_an_empty_output_is_removed(tmp_path: Path) -> None:
    with Results(tmp_path / "out.jsonl"):
        assert (tmp_path / "out.jsonl").exists()
    assert not list(tmp_path.iterdir())


def test_a_changed_byte_changes_the_model_digest(tiny_llama, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf")
    first, raw = model_digest(path), path.read_bytes()
    assert model_digest(path) == first
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert model_digest(path) != first


def test_a_changed_byte_in_any_part_changes_the_model_digest(tiny_llama, tmp_path: Path) -> None:
    names = split_model(tiny_llama(tmp_path / "model.gguf"), tmp_path / "parts.gguf", 100_000)
    first, raw = model_digest(names[0]), names[-1].read_bytes()
    names[-1].write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert model_digest(names[0]) != first
