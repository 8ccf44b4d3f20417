"""Every RoPE scaling of a checkpoint's config is read as transformers reads it: contexts, bands and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as checkpoints
import torch
from ropewalk.container import Header, native_schedule, read_header, schedule_of, what_stock_does
from ropewalk.convert import convert_checkpoint, plan_extension
from ropewalk.errors import UserError
from ropewalk.factors import Schedule, extend, yarn
from test_checkpoint_oracle import half_gelu, llama_logits, minicpm_logits, some_tokens
from tiny_checkpoints import GEMMA2, GEMMA3, LLAMA, LONG, MISTRAL, PHI3, PHI3_TOKENS, QWEN2, QWEN3, SHORT, YARN

RISING = [1.0 + 0.2 * i for i in range(16)]  # for QWEN3, whose heads are of 32 dimensions
LONGROPE = {
    "long_factor": LONG,
    "short_factor": SHORT,
    "original_max_position_embeddings": 64,
    "rope_type": "longrope",
}
LONGROPE_32 = {**LONGROPE, "long_factor": [x + 0.5 for x in RISING], "short_factor": RISING}
LLAMA3 = checkpoints.LLAMA3_ROPE
RECIPE = {"factor": 4.0, "original_max_position_embeddings": 256, "type": "yarn"}


def written(folder: Path, name: str, config: dict[str, Any]) -> Path:
    tokeniser = checkpoints.V3 if config["model_type"] == "mistral" else checkpoints.V1
    added = PHI3_TOKENS if config["model_type"] == "phi3" else ()
    case = checkpoints.Case(name, config, tokeniser, added=added)
    if not case.can_be_made():
        pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
    return checkpoints.write_checkpoint(case, folder)


def expected_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if model.config.model_type.startswith("gemma"):
        for layer in model.model.layers:
            layer.mlp.act_fn.forward = half_gelu
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "longrope, llama": (LLAMA, {**LONGROPE, "factor": 4.0}, [64, 256]),
    "longrope, its factor from the contexts": (LLAMA, LONGROPE, [64, 256]),
    "longrope, its own attention factor": (LLAMA, {**LONGROPE, "attention_factor": 0.8}, [64, 256]),
    "longrope, positions unscaled": ({**LLAMA, "max_position_embeddings": 64}, {**LONGROPE, "factor": 4.0}, [64, 256]),
    "longrope, mistral": (MISTRAL, LONGROPE, [64, 256]),
    "longrope, qwen2": (QWEN2, LONGROPE, [64, 256]),
    "longrope, qwen3": (QWEN3, LONGROPE_32, [64, 256]),
    "longrope, phi3": ({**PHI3, "max_position_embeddings": 256, "sliding_window": None}, LONGROPE, [64, 256]),
    "yarn, qwen2's recipe": (QWEN2, RECIPE, [1024]),
    "yarn, qwen3's recipe": ({**QWEN3, "max_position_embeddings": 320}, RECIPE, [1024]),
    "yarn, no original context": (LLAMA, {"factor": 4.0, "type": "yarn"}, [1024]),
    "yarn, two original contexts": ({**LLAMA, "original_max_position_embeddings": 32}, YARN, [256]),
    "yarn, no factor": (LLAMA, {**YARN, "factor": None}, [256]),
    "yarn, unrounded": (QWEN3, {**YARN, "truncate": False}, [256]),
    "yarn, unrounded, llama": (LLAMA, {**YARN, "truncate": False}, [256]),
    "yarn, rounded": (QWEN3, {**YARN, "truncate": True}, [256]),
    "yarn, mscale": (QWEN3, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, [256]),
    "yarn, equal mscales": (LLAMA, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, [256]),
    "yarn, mscale alone": (QWEN2, {**YARN, "mscale": 0.7}, [256]),
    "yarn, mscale and attention factor": (
        QWEN2,
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": 0.9},
        [256],
    ),
    "yarn, gemma2": (GEMMA2, YARN, [256]),
    "linear, gemma2": (GEMMA2, {"factor": 4.0, "type": "linear"}, [256]),
    "yarn, gemma3": (GEMMA3, {**checkpoints.without(YARN, "type"), "rope_type": "yarn"}, [256]),
    "longrope, gemma2": (GEMMA2, LONGROPE_32, [64, 256]),
    "another base, gemma2": ({**GEMMA2, "rope_theta": 500.0}, {}, [256]),
    "llama3, qwen2": (QWEN2, LLAMA3, [256]),
    "llama3, qwen3": (QWEN3, LLAMA3, [256]),
    "llama3, gemma3": (GEMMA3, LLAMA3, [256]),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    config, scaling, contexts = CASES[case]
    if scaling:
        config = {**config, "rope_scaling": scaling}
    folder, file = written(tmp_path, "model", config), tmp_path / "out.gguf"
    convert_checkpoint(folder, file, weight_type="f32")
    schedule = schedule_of(read_header(file))
    assert [band.context for band in schedule.bands] == contexts
    allowed = 2e-3 if config["model_type"].startswith("gemma") else 1e-3
    for n_tokens in (24, 96) if len(contexts) > 1 else (48,):  # the second length is in the second band
        tokens = some_tokens(config["vocab_size"], n_tokens)
        found = llama_logits(file, tokens, 128 if contexts[-1] > 64 else 64)
        assert np.abs(found - expected_logits(folder, tokens)).max() < allowed


def test_longrope_of_minicpm(tmp_path: Path) -> None:
    config = {**checkpoints.MINICPM, "max_position_embeddings": 256, "rope_scaling": LONGROPE}
    folder, file = written(tmp_path, "model", config), tmp_path / "out.gguf"
    convert_checkpoint(folder, file, weight_type="f32")
    assert [band.context for band in schedule_of(read_header(file)).bands] == [64, 256]
    for n_tokens in (24, 96):
        tokens = some_tokens(config["vocab_size"], n_tokens)
        expected = minicpm_logits(folder, config, tokens)
        assert np.abs(llama_logits(file, tokens, 128) - expected).max() < 1e-3


def test_phi3_may_have_other_scaling(tmp_path: Path) -> None:
    """transformers takes only LongRoPE for this class, other programs any."""
    for scaling in (YARN, {"factor": 4.0, "type": "linear"}):
        folder = written(tmp_path, scaling["type"], {**PHI3, "rope_scaling": scaling})
        convert_checkpoint(folder, tmp_path / "out.gguf", force=True)
        (band,) = schedule_of(read_header(tmp_path / "out.gguf")).bands
        expected = yarn(16, 4.0, 10000.0, 64) if scaling is YARN else np.full(8, 4.0)
        np.testing.assert_allclose(band.rescale_factors, expected)


def test_scaling_added_to_a_newer_config_counts(tmp_path: Path) -> None:
    config = {**checkpoints.without(QWEN2, "rope_theta"), "rope_scaling": RECIPE}
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    convert_checkpoint(written(tmp_path, "model", config), tmp_path / "out.gguf")
    schedule = schedule_of(read_header(tmp_path / "out.gguf"))
    assert (schedule.context, schedule.facts.freq_base) == (1024, 500000.0)
    assert max(schedule.bands[0].rescale_factors) == 4


def test_what_the_scaling_holds_is_what_stock_programs_see(tmp_path: Path) -> None:
    convert_checkpoint(written(tmp_path, "model", {**QWEN2, "rope_scaling": RECIPE}), tmp_path / "out.gguf")
    header = read_header(tmp_path / "out.gguf")
    assert header.get("qwen2.context_length") == 1024
    assert what_stock_does(header) == ["runs it as it is, up to 1,024 tokens."]


def test_stock_programs_scale_with_another_ramp(tmp_path: Path) -> None:
    """llama.cpp has YaRN's own betas for this architecture, whatever the file says."""
    config = {**QWEN2, "rope_scaling": {**RECIPE, "beta_fast": 4.0}}
    convert_checkpoint(written(tmp_path, "model", config), tmp_path / "out.gguf")
    header = read_header(tmp_path / "out.gguf")
    own, stock = (schedule.bands[-1].rescale_factors for schedule in (schedule_of(header), native_schedule(header)))
    most = max(abs(b / a - 1) for a, b in zip(stock, own, strict=True))
    assert most > 0.1
    assert what_stock_does(header) == [
        "cannot take rescale factors for this 'qwen2' model: it runs the file with the scaling of its metadata, up to"
        f" 1,024 tokens, whose factors differ by up to {most:.0%}. Run it with ropewalk."
    ]


@pytest.mark.parametrize(
    ("config", "scaling"),
    [(QWEN2, RECIPE), (QWEN3, {**YARN, "truncate": False}), (QWEN2, LONGROPE), (LLAMA, LONGROPE)],
    ids=["recipe", "unrounded", "longrope, qwen2", "longrope, llama"],
)
def test_extending_starts_from_the_models_own_scaling(
    config: dict[str, Any], scaling: dict[str, Any], tmp_path: Path
) -> None:
    """New bands go on top of the whole of it, whether it has a native form or not; what it holds needs none."""
    folder = written(tmp_path, "model", {**config, "rope_scaling": scaling})
    convert_checkpoint(folder, tmp_path / "own.gguf")
    own = schedule_of(read_header(tmp_path / "own.gguf"))
    notes: list[str] = []

    def choose(header: Header) -> Schedule:
        plan = plan_extension(header, 2 * own.context, "yarn")
        notes.append(plan.note)
        return plan.schedule

    convert_checkpoint(folder, tmp_path / "long.gguf", choose=choose)
    long = schedule_of(read_header(tmp_path / "long.gguf"))
    assert long == extend(own, 2 * own.context) and long.bands[: len(own.bands)] == own.bands
    assert "the model's own scaling" in notes[0] and "is kept" in notes[0]
    with pytest.raises(UserError, match=f"expected more than the {own.context} tokens"):
        convert_checkpoint(
            folder, tmp_path / "no.gguf", choose=lambda header: plan_extension(header, own.context, "yarn").schedule
        )
    assert not (tmp_path / "no.gguf").exists()


def test_the_models_own_scaling_can_be_replaced(tmp_path: Path) -> None:
    folder = written(tmp_path, "model", {**QWEN3, "rope_scaling": {**YARN, "truncate": False}})
    convert_checkpoint(
        folder,
        tmp_path / "out.gguf",
        choose=lambda header: plan_extension(header, 256, "pi", existing="replace").schedule,
    )
    schedule = schedule_of(read_header(tmp_path / "out.gguf"))
    assert [band.context for band in schedule.bands] == [64, 128, 256]
    assert [set(band.rescale_factors) for band in schedule.bands] == [{1.0}, {2.0}, {4.0}]


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({**RECIPE, "factor": 1e9}, "rope_scaling.factor: 1000000000.0, expected a number from 1 to 1024"),
        (
            {**RECIPE, "original_max_position_embeddings": 2**30},
            "rope_scaling.factor: 4.0, expected a context of at most 2,147,483,647",
        ),
        ({**RECIPE, "factor": 0.5}, "rope_scaling.factor: 0.5, expected a number from 1"),
        ({**RECIPE, "truncate": "no"}, "rope_scaling.truncate: 'no', expected true or false"),
        ({**RECIPE, "mscale": -1, "mscale_all_dim": 1}, "rope_scaling.mscale: -1.0, expected a positive number"),
        ({**RECIPE, "original_max_position_embeddings": 0.5}, "original_max_position_embeddings: 0.5, expected"),
        ({**RECIPE, "original_max_position_embeddings": -4}, r"original_max_position_embeddings: -4(\.0)?, expected"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings: 1, expected"),
        ({**LONGROPE, "long_factor": [0.0] * 8}, "long_factor: 0.0, expected positive numbers"),
        ({"type": "dynamic", "factor": 1e12}, "rope_scaling.factor: 1000000000000.0, expected a number from 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_invalid_scaling_is_refused_by_name(
    base: dict[str, Any], scaling: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = written(tmp_path, "model", {**base, "rope_scaling": scaling})
    with pytest.raises(UserError, match=message):
        convert_checkpoint(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
