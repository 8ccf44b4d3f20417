"""The two evaluators: they agree with each other and with llama.cpp, and screening is exact where it can be."""

import pydoc_data.topics
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
import ropewalk
from ropewalk import UserError
from ropewalk.container import native_schedule, read_header
from ropewalk.convert import convert_model
from ropewalk.factors import extend
from ropewalk.factors.search.protocol import Task
from ropewalk.runtime.measure.evaluators import faster, make_evaluator
from ropewalk.runtime.measure.evaluators import llama as llama_evaluator
from ropewalk.runtime.measure.evaluators.spec import EvaluatorSpec
from ropewalk.runtime.measure.passages import Text, make_passages
from ropewalk.runtime.measure.readings import reader
from ropewalk.runtime.measure.torch_reader import weights

TEXT = "\n\n".join(pydoc_data.topics.topics.values())
CONTEXT = 384


@pytest.fixture(scope="module")
def band(smollm2):
    """As if the model had been trained for 256 tokens: λ that matter in a short text."""
    native = native_schedule(read_header(smollm2))
    facts = native.facts.model_copy(update={"original_context": 256})
    short = native.bands[0].model_copy(update={"context": 256})
    return extend(native.model_copy(update={"facts": facts, "bands": (short,)}), CONTEXT, contexts=[CONTEXT]).bands[-1]


@pytest.fixture(scope="module")
def spec(smollm2, band):
    vocab = ropewalk.Llama(smollm2, vocab_only=True, verbose=False)
    passages = make_passages(vocab, [Text("a", TEXT), Text("b", TEXT[99_000:])], CONTEXT, 2, "tail+0.5*needle", 256)
    vocab.close()
    return EvaluatorSpec(str(smollm2), passages, band, window=128, threads=2)


@pytest.fixture(scope="module")
def evaluators(spec):
    by_kind = {kind: make_evaluator(replace(spec, kind=kind)) for kind in ("llama", "torch")}
    yield by_kind
    for evaluator in by_kind.values():
        evaluator.close()


def other(band, start_tokens=0):
    factors = tuple(factor * 1.05 for factor in band.rescale_factors)
    changes = {"rescale_factors": factors, "start_tokens": start_tokens, "attention_factor": 1.02}
    return band.model_copy(update=changes)


def test_llama_cpp_evaluates_exactly(evaluators, smollm2):
    readers = evaluators["llama"]._llm, reader(smollm2, 256)
    for llm in readers:
        assert llm.computed_by == "torch" or llm.computed_by.endswith(" exact")
    readers[1].close()


def test_they_agree_and_give_the_weighted_loss_of_the_targets(evaluators, spec, band, smollm2):
    for candidate in (band, other(band), other(band, 16)):
        losses = {kind: e.evaluate(Task(candidate, 1)).loss for kind, e in evaluators.items()}
        assert losses["torch"] == pytest.approx(losses["llama"], rel=5e-3)
    passage = spec.passages[1]
    schedule = native_schedule(read_header(smollm2))
    alone = schedule.model_copy(update={"bands": (other(band, 16).model_copy(update={"context": 8192}),)})
    llm = ropewalk.Llama(smollm2, schedule=alone, n_ctx=CONTEXT, kv="f16", flash_attn=True, exact=True, verbose=False)
    direct = llm.token_losses(passage.tokens, targets=passage.targets) @ np.array(passage.weights)
    llm.close()
    assert losses["llama"] == pytest.approx(direct, abs=1e-6)


def test_losses_are_llama_cpps_own_perplexity(tiny_llama, tmp_path):
    """llama.cpp's perplexity is exp of the mean of -log softmax over the logits of a single decode of all tokens."""
    path = tiny_llama(tmp_path / "tiny.gguf", context_length=512)
    plain = native_schedule(read_header(path)).bands[0]
    vocab = ropewalk.Llama(path, vocab_only=True, verbose=False)
    (passage,) = passages = make_passages(vocab, [Text("a", TEXT)], 500, 1, "tail", 250)
    vocab.close()
    stock = llama_cpp.Llama(str(path), n_ctx=500, n_batch=500, logits_all=True, n_threads=2, verbose=False)
    stock.eval(list(passage.tokens))
    before = np.array(passage.targets) - 1
    chosen = stock.logits_to_logprobs(stock.scores[before])[
        np.arange(len(before)), np.array(passage.tokens)[before + 1]
    ]
    stock.close()
    for kind in ("llama", "torch"):
        evaluator = make_evaluator(EvaluatorSpec(str(path), passages, plain, kind=kind, window=64, threads=2))
        assert np.exp(evaluator.losses(plain, 0).mean()) == pytest.approx(np.exp(-chosen.mean()), rel=1e-3)
        evaluator.close()


@pytest.mark.parametrize("kind", ["llama", "torch"])
def test_screening_is_exact_in_the_base_band_and_near_it_elsewhere(evaluators, spec, band, kind):
    evaluator, window = evaluators[kind], spec.passages[0].last(spec.window)
    places = np.searchsorted(spec.passages[0].targets, window.targets)
    screened = evaluator.losses(band, 0, "screen")
    np.testing.assert_allclose(screened, evaluator.losses(band, 0)[places], atol=0.02)
    away = other(band, 16)
    full, screened = evaluator.losses(away, 0)[places], evaluator.losses(away, 0, "screen")
    assert abs(full.mean() - screened.mean()) < 0.1
    assert evaluator.evaluate(Task(away, 0, "screen")).loss == pytest.approx(screened @ np.array(window.weights))


def test_a_kept_state_is_the_same_on_either_path(smollm2, band):
    """Bit for bit: a resumed search finds full readings in its journal and creates the states again."""
    vocab = ropewalk.Llama(smollm2, vocab_only=True, verbose=False)
    passages = make_passages(vocab, [Text("a", TEXT)], 640, 1, "tail", 256)
    vocab.close()
    for kind in ("llama", "torch"):
        losses = []
        for tasks in ([Task(band, 0), Task(other(band), 0, "screen")], [Task(other(band), 0, "screen")]):
            evaluator = make_evaluator(EvaluatorSpec(str(smollm2), passages, band, kind, window=128, threads=2))
            losses.append([evaluator.evaluate(task).loss for task in tasks][-1])
            assert evaluator.losses(other(band), 0, "screen").mean() == pytest.approx(losses[-1], rel=1e-9)
            evaluator.close()
        assert losses[0] == losses[1]


def test_the_first_tokens_keep_the_models_own_factors_in_both(tiny_llama, tmp_path):
    """If a file's short band was searched as well, the model's own factors are not those of its first band."""
    source, target = tiny_llama(tmp_path / "m.gguf", context_length=256), tmp_path / "long.gguf"
    native = native_schedule(read_header(source))
    short = native.bands[0].model_copy(update={"rescale_factors": (1.5,) * (native.facts.n_rot // 2)})
    long = extend(native, 512).bands[-1].model_copy(update={"start_tokens": 64})
    convert_model(source, target, schedule=native.model_copy(update={"bands": (short, long)}))
    vocab = ropewalk.Llama(target, vocab_only=True, n_ctx=1, verbose=False)
    passages = make_passages(vocab, [Text("a", TEXT)], 512, 1, "all", 256)
    vocab.close()
    losses = {}
    for path, kind in ((source, "torch"), (target, "torch"), (target, "llama")):
        evaluator = make_evaluator(EvaluatorSpec(str(path), passages, long, kind, window=0, kv="f32"))
        losses[path, kind] = evaluator.losses(long, 0)
        evaluator.close()
    np.testing.assert_array_equal(losses[target, "torch"], losses[source, "torch"])
    assert losses[target, "torch"].mean() == pytest.approx(losses[target, "llama"].mean(), rel=2e-4)


def test_the_state_for_screening_does_not_depend_on_earlier_tasks(spec, band):
    """A resumed search reads the base band again when it screens, and must get the same bits."""
    candidate = other(band, 8)
    for kind in ("llama", "torch"):
        losses = []
        for before in ([Task(band, 1)], [Task(candidate, 1), Task(band, 0)], []):
            evaluator = make_evaluator(replace(spec, kind=kind))
            for task in before:
                evaluator.evaluate(task)
            losses.append(evaluator.evaluate(Task(candidate, 1, "screen")).loss)
            evaluator.close()
        assert len(set(losses)) == 1


def test_order_does_not_matter(evaluators, band):
    for evaluator in evaluators.values():
        tasks = [Task(band, 0), Task(other(band, 16), 1, "screen"), Task(band, 0, "screen"), Task(other(band), 0)]
        first = [evaluator.evaluate(task).loss for task in tasks]
        again = [evaluator.evaluate(task).loss for task in reversed(tasks)][::-1]
        np.testing.assert_allclose(first, again, rtol=2e-5)


def test_gradients_come_from_torch(evaluators, band):
    result = evaluators["torch"].evaluate(Task(band, 0, "full", gradient=True))
    assert result.loss == pytest.approx(evaluators["torch"].evaluate(Task(band, 0)).loss, rel=1e-5)
    step = 0.01
    up = band.model_copy(update={"attention_factor": band.attention_factor * np.exp(step)})
    down = band.model_copy(update={"attention_factor": band.attention_factor * np.exp(-step)})
    slope = (evaluators["torch"].evaluate(Task(up, 0)).loss - evaluators["torch"].evaluate(Task(down, 0)).loss) / (
        2 * step
    )
    assert result.by_log_attention == pytest.approx(slope, rel=0.1, abs=5e-3)
    assert len(result.by_log_factors) == len(band.rescale_factors)
    screened = evaluators["torch"].evaluate(Task(band, 0, "screen", gradient=True))
    assert np.isfinite(screened.by_log_factors).all()
    with pytest.raises(UserError, match="torch evaluator"):
        evaluators["llama"].evaluate(Task(band, 0, gradient=True))


def test_the_key_covers_all_that_a_loss_depends_on(spec, band):
    same = replace(spec, threads=1)
    others = [
        replace(spec, passages=spec.passages[:1]),
        replace(spec, base=other(band)),
        replace(spec, kind="torch"),
        replace(spec, window=32),
        replace(spec, kv="q8_0"),
    ]
    assert same.key == spec.key and len({spec.key, *(one.key for one in others)}) == 6
    assert replace(spec, kind="torch", kv="q8_0").key == replace(spec, kind="torch").key  # torch has no such cache


def test_states_for_screening_must_fit_into_memory(evaluators, spec, band, monkeypatch):
    for place in (llama_evaluator, weights):
        monkeypatch.setattr(place, "available_memory", lambda: 1 << 20)
    for evaluator in evaluators.values():
        evaluator._states.clear()
        with pytest.raises(UserError, match=r"not enough memory to screen 2 passages: [1-9]"):
            evaluator.evaluate(Task(band, 0, "screen"))


def test_the_faster_evaluator_is_measured(spec):
    kind, speeds = faster(spec, n_tokens=128)
    assert set(speeds) == {"llama", "torch"} and speeds[kind] == max(speeds.values()) and min(speeds.values()) > 1
