"""The suite's tasks: the same for the same seed, as long as they should be, and their needles where they say."""

import pydoc_data.topics
import re
from itertools import pairwise

import pytest
import ropewalk
from ropewalk import UserError
from ropewalk.runtime.measure.passages import Text
from ropewalk.runtime.measure.suites import hints
from ropewalk.runtime.measure.suites.haystacks import Essays, nearest, noise
from ropewalk.runtime.measure.suites.pen import Pen
from ropewalk.runtime.measure.suites.tasks import TASKS, haystacks_for, named_tasks, questions_about

TEXT = "\n\n".join(pydoc_data.topics.topics.values())
LENGTH = 2100  # common words need some 1,900 tokens


@pytest.fixture(scope="module")
def vocab(smollm2):
    llm = ropewalk.Llama(smollm2, vocab_only=True, verbose=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def pen(vocab):
    return Pen(vocab)


@pytest.fixture(scope="module")
def essays(pen):
    return Essays(pen, [Text("doc", TEXT)])


@pytest.fixture(scope="module")
def made(pen, essays):
    return {task.name: questions_about(pen, essays, task, LENGTH, 1, 4, seed=3) for task in TASKS.values()}


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_questions(pen, essays, made, name):
    again = questions_about(pen, Essays(pen, [Text("doc", TEXT)]), TASKS[name], LENGTH, 1, 4, seed=3)
    assert again == made[name]
    assert questions_about(pen, essays, TASKS[name], LENGTH, 1, 4, seed=4) != again
    assert questions_about(pen, essays, TASKS[name], LENGTH, 2, 4, seed=3) != again


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_their_length_exactly(made, name):
    lengths = [len(question.prompt) + question.max_tokens for question in made[name]]
    assert max(lengths) == LENGTH and min(lengths) > LENGTH - 100
    if name.startswith("niah_single"):
        assert set(lengths) == {LENGTH}
    assert all(question.cuts[-1] < len(question.prompt) for question in made[name])


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("niah_single")])
def test_questions_share_their_haystack(made, name):
    first, *rest = made[name]
    (cut,) = first.cuts
    assert all(question.cuts == (cut,) and question.prompt[:cut] == first.prompt[:cut] for question in rest)
    assert len({question.prompt for question in made[name]}) == len(made[name]) == (1 if name in ("cwe", "fwe") else 4)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_single_3"])
def test_a_single_needle_is_the_only_one_and_the_text_before_it_is_shared(pen, made, name):
    questions = made[name]
    assert [q.depth for q in questions] == sorted((q.depth for q in questions), reverse=True)
    for deeper, question in pairwise(questions):
        assert question.cuts == deeper.cuts[:-1]
        assert question.prompt[: question.cuts[-1]] == deeper.prompt[: question.cuts[-1]]
    for question in questions:
        text = pen.text(question.prompt[: len(question.prompt) - 60])
        assert len(re.findall(r"The registry \w+ of \S+ is \S+\.", text)) == 1


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.has_depth])
def test_the_needle_is_where_it_says(pen, made, name):
    for question in made[name]:
        (reference,) = question.references
        start = len(pen.head) + question.prompt[len(pen.head) :].index(pen.tokens("\n\n")[0]) + 1
        # Of a single needle the haystack is as long as its own question leaves.
        text = pen.text(question.prompt)
        end = len(pen.tokens(text[text.rindex("\n\nWhich") :]))
        body = len(question.prompt) - start - end
        at = start + round(question.depth * body)
        near = pen.text(question.prompt[at - 8 : at + 110])
        assert reference in near, (question.depth, near)
        assert text.count(reference) == 1  # the prompt does not end with it, and nothing else says it


def test_what_is_asked_can_be_answered_from_the_text(pen, made):
    for name in ("niah_multivalue", "niah_multiquery"):
        for question in made[name]:
            text = pen.text(question.prompt)
            assert all(f" is {value}." in text for value in question.references) and len(question.references) == 4
            assert pen.text(question.answer).strip() == ", ".join(question.references)
    for question in made["niah_multivalue"]:
        text = pen.text(question.prompt)
        key = re.search(r"give for (\S+)\?", text)[1]
        assert re.findall(rf"The registry number of {key} is (\d+)\.", text) == list(question.references)
    for question in made["vt"]:
        text = pen.text(question.prompt)
        value = re.search(r"hold the number (\d+) in the end", text)[1]
        held = {}
        for name, what in re.findall(r"SET (\w+) = (\w+)\.", text):
            held[name] = held.get(what, what)
        assert [name for name, what in held.items() if what == value] == list(question.references)
        assert len(question.references) == 5
    for task in ("facts_2", "facts_3"):
        for question in made[task]:
            text = pen.text(question.prompt)
            who = {}
            for name, thing in re.findall(r"(\w+) picked up the (\w+)\.", text):
                who[thing] = name
            thing = re.search(r"Where (?:is|was) the (\w+)", text)[1]
            went = re.findall(rf"{who[thing]} went to the (\w+)\.", text)
            assert len(went) == (1 if task == "facts_2" else 2) and question.references == (went[0],)


def test_common_and_frequent_words_are_those(pen, made):
    (common,) = made["cwe"]
    listed = re.findall(r"\d+\. (\S+)", pen.text(common.prompt[: common.cuts[0]]))
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, n in counts.items() if n == 30} == set(common.references) and len(common.references) == 10
    assert set(counts.values()) == {3, 30}
    (frequent,) = made["fwe"]
    words = pen.text(frequent.prompt[: frequent.cuts[0]]).split("appears.\n\n")[1].split()
    order = sorted(set(words), key=words.count, reverse=True)
    assert order[0] == "..." and tuple(order[1:4]) == frequent.references
    assert words.count(order[3]) > words.count(order[4])


def test_hints_share_no_word_with_their_question():
    def words(*texts):
        return set(re.findall(r"\w+", " ".join(texts).lower()))

    for country in hints.SIGHTS:
        asked = words(hints.question(country), hints.opening(country))
        assert not asked & words(*(hints.needle("Ruben", other) for other in hints.SIGHTS)), country
    assert len(hints.NAMES) == len(set(hints.NAMES)) == hints.MOST
    assert not words(*hints.NAMES) & words(*hints.SIGHTS.values(), *hints.SIGHTS)


def test_depths_change_from_haystack_to_haystack(pen, essays):
    for name in ("niah_single_2", "niah_multikey_2", "hints"):
        found = [questions_about(pen, essays, TASKS[name], 1000, i, 1, 0)[0].depth for i in range(8)]
        assert min(found) < 0.2 and max(found) > 0.8 and len({round(depth, 2) for depth in found}) > 6


def test_cells_have_as_few_haystacks_as_samples_need():
    assert haystacks_for(TASKS["niah_single_1"], 50, 10).count == 5
    assert haystacks_for(TASKS["niah_multikey_1"], 50, 10).count == 13  # four keys each
    assert haystacks_for(TASKS["cwe"], 7, 10).count == 7
    assert haystacks_for(TASKS["vt"], 3, 10).questions == 3
    assert haystacks_for(TASKS["vt"], 50, 1).count == 50


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_says_how_long_it_must_be(pen, essays, name):
    with pytest.raises(UserError, match=f"{name}: 90 tokens are too few, expected at least") as error:
        questions_about(pen, essays, TASKS[name], 90, 0, 4, 0)
    least = int(re.search(r"at least ([\d,]+)", str(error.value))[1].replace(",", ""))
    assert 90 < least < 2000
    assert questions_about(pen, essays, TASKS[name], least + 150, 0, 4, 0)


def test_texts_may_be_too_short_and_tasks_unknown(pen):
    with pytest.raises(UserError, match="the texts have 3 tokens, too few for a haystack"):
        questions_about(pen, Essays(pen, [Text("x", "Two words.")]), TASKS["hints"], 1000, 0, 1, 0)
    with pytest.raises(UserError, match="--tasks: 'niah', expected some of niah_single_1, "):
        named_tasks(["vt", "niah"])
    assert [task.name for task in named_tasks(["vt", "cwe", "vt"])] == ["vt", "cwe"]


def test_prompts_without_a_chat_template(vocab, pen):
    plain = Pen(vocab, chat=False)
    assert pen.chat and not plain.chat and len(plain.head) <= 1 < len(pen.head)
    assert plain.head == vocab.tokenize(b"", add_bos=True)
    assert pen.text(plain.answer("The word is", "yes")[0]) == "The word is"
    given, rest = pen.answer("The number is", "123")
    assert pen.text(given + rest) == "The number is 123" and pen.text(rest).strip() == "123"


def test_sentences_follow_one_another_and_start_over(pen, essays):
    import random

    found = essays.sentences(random.Random(0), 500)
    assert 500 <= sum(map(len, found)) < 1500
    few = Essays(pen, [Text("x", "One here. Two there.\n\nThree")])
    wanted = sum(len(pen.after(text)) for text in ("One here.", "Two there.", "Three"))
    texts = [[pen.text(tokens).strip() for tokens in few.sentences(random.Random(i), wanted)] for i in range(9)]
    assert ["Two there.", "Three", "One here."] in texts and ["One here.", "Two there.", "Three"] in texts
    assert sum(map(len, noise(pen, 100))) >= 100
    assert [nearest([0, 10, 20], x) for x in (0, 4, 6, 19, 40)] == [0, 0, 10, 20, 20]
