"""The torch reader on a GPU, if there is one: the CPU's numbers, attention in 16 bits, reproducible bits."""

import pydoc_data.topics

import numpy as np
import pytest
import ropewalk
import torch
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import extend
from ropewalk.runtime.measure.torch_reader.model import load_torch_model

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

TARGETS = range(512, 1024)


@pytest.fixture(scope="module")
def tokens(smollm2):
    vocab = ropewalk.Llama(smollm2, vocab_only=True, verbose=False)
    found = vocab.tokenize("\n\n".join(pydoc_data.topics.topics.values()).encode(), add_bos=False)[:1024]
    vocab.close()
    return found


@pytest.fixture(scope="module")
def band(smollm2):
    return extend(native_schedule(read_header(smollm2)), 16384).bands[-1]


@pytest.fixture(scope="module")
def models(smollm2):
    return load_torch_model(smollm2), load_torch_model(smollm2, device="cuda")


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_in_32_bits_it_gives_the_cpus_numbers(models, tokens, band):
    cpu, gpu = models
    expected = cpu.token_losses(tokens, band, TARGETS)
    np.testing.assert_allclose(gpu.token_losses(tokens, band, TARGETS), expected, atol=2e-3)
    found, gradient = (model.loss_and_gradient(tokens, band, TARGETS) for model in (gpu, cpu))
    assert relative_error(found.by_log_factors, gradient.by_log_factors) < 1e-3
    state = gpu.prefix_state(tokens[:600], band)
    window = gpu.window_losses(state, tokens, band, range(602, 1024))
    np.testing.assert_allclose(window, expected[90:], atol=5e-3)


def test_attention_in_16_bits_is_close_and_reproducible(smollm2, tokens, band):
    gpu = load_torch_model(smollm2, device="cuda")
    exact = gpu.loss_and_gradient(tokens, band, TARGETS)
    assert gpu.try_half(tokens, band)
    half, again = (gpu.loss_and_gradient(tokens, band, TARGETS) for _ in range(2))
    assert half.loss == pytest.approx(exact.loss, rel=1e-3) and half.loss != exact.loss
    assert relative_error(half.by_log_factors, exact.by_log_factors) < 0.1
    assert half.loss == again.loss and np.array_equal(half.by_log_factors, again.by_log_factors)


def test_a_cpu_has_no_attention_in_16_bits(models, tokens, band):
    assert not models[0].try_half(tokens, band)
