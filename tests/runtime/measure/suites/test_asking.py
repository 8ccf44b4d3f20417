"""Asking: what the cache holds is not read again, and changes nothing; the journal keeps answers."""

import pydoc_data.topics

import pytest
from ropewalk import UserError
from ropewalk.container import read_header, trained_schedule
from ropewalk.runtime.measure import Text, band_by_method, reader
from ropewalk.runtime.measure.suites import asking
from ropewalk.runtime.measure.suites.asking import SuitePlan, ask, ask_all, question_key
from ropewalk.runtime.measure.suites.haystacks import Essays
from ropewalk.runtime.measure.suites.journal import Journal
from ropewalk.runtime.measure.suites.pen import Pen
from ropewalk.runtime.measure.suites.tasks import TASKS, named_tasks, questions_about

LENGTH = 640


@pytest.fixture(scope="module")
def llm(smollm2):
    llm = reader(smollm2, 1024, "f16")
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def pen(llm):
    return Pen(llm)


@pytest.fixture(scope="module")
def essays(pen):
    return Essays(pen, [Text("doc", "\n\n".join(pydoc_data.topics.topics.values()))])


@pytest.fixture(scope="module")
def bands(smollm2):
    native = trained_schedule(read_header(smollm2))
    pi = band_by_method("pi", 32768, native, None)
    return {"none": native.bands[0], "pi": pi.model_copy(update={"context": 8192})}


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1"])
def test_a_shared_haystack_is_read_once_and_each_answer_is_as_if_it_were_asked_alone(llm, pen, essays, bands, task):
    questions = questions_about(pen, essays, TASKS[task], LENGTH, 0, 3, 0)
    read = []
    evaluate = llm.eval
    llm.eval = lambda tokens: (read.append(len(tokens)), evaluate(tokens))[1]
    try:
        llm.reset()
        together = [ask(llm, pen, question, bands["none"]) for question in questions]
    finally:
        del llm.eval
    for question, found in zip(questions, together, strict=True):
        llm.reset()
        alone = ask(llm, pen, question, bands["none"])
        assert (alone.loss, alone.said, alone.score) == (found.loss, found.said, found.score)
    long = sum(n for n in read if n > 40)
    assert long < 1.1 * LENGTH  # and for single needles, what comes after each is read by `token_losses`


def test_the_model_finds_a_number_in_a_short_text_and_bands_differ(llm, pen, essays, bands):
    questions = questions_about(pen, essays, TASKS["niah_multikey_1"], LENGTH, 0, 4, 0)
    own = [ask(llm, pen, question, bands["none"]) for question in questions]
    other = [ask(llm, pen, question, bands["pi"]) for question in questions]
    assert sum(read.score for read in own) >= 2 and sum(read.loss for read in own) / 4 < 1.5
    assert sum(read.loss for read in other) > sum(read.loss for read in own)
    keys = {question_key("m", "f16", band, question) for question in questions for band in bands.values()}
    assert len(keys) == 8 and question_key("m", "q8_0", bands["pi"], questions[0]) not in keys


def test_what_the_journal_knows_is_not_asked_again(llm, pen, essays, bands, tmp_path, monkeypatch):
    plan = SuitePlan(named_tasks(["niah_multikey_1", "facts_2"]), {LENGTH: bands}, samples=2, share=2)
    steps = []
    with Journal(tmp_path / "j.jsonl") as journal:
        llm.reset()
        first = list(ask_all(llm, essays, pen, plan, journal, "m", lambda done, total: steps.append(done / total)))
    assert len(first) == 8 and [answer.method for answer in first] == 2 * ["none", "none", "pi", "pi"]
    assert steps == sorted(steps) and steps[-1] == pytest.approx(1)
    lines = (tmp_path / "j.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    (tmp_path / "k.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed while it wrote the sixth
    with Journal(tmp_path / "k.jsonl") as journal:
        llm.reset()
        again = list(ask_all(llm, essays, pen, plan, journal, "m", lambda done, total: None))
    assert [(a.loss, a.said, a.depth) for a in again] == [(a.loss, a.said, a.depth) for a in first]
    assert again[:5] == first[:5]  # their times, too: they were not asked
    monkeypatch.setattr(asking, "ask", None)
    with Journal(tmp_path / "k.jsonl") as journal:
        assert list(ask_all(llm, essays, pen, plan, journal, "m", lambda done, total: None)) == again


def test_a_journal_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    for line in ('{"id": "x"}\n', '{"key": "x", "asked": {}, "found": 3}\n', "[]\n"):
        path.write_text(line)
        with pytest.raises(UserError, match="line 1 is not a result of ropewalk eval --suite"):
            Journal(path)
        assert path.read_text() == line


def test_a_length_that_is_too_short_is_refused_before_anything_is_read(llm, pen, essays, bands):
    plan = SuitePlan(named_tasks(["facts_2", "cwe"]), {LENGTH: bands, 700: bands}, samples=1, share=1)
    llm.reset()
    with pytest.raises(UserError, match="cwe: 640 tokens are too few"):
        list(ask_all(llm, essays, pen, plan, Journal(None), "m", lambda done, total: None))
    assert llm.n_tokens == 0
