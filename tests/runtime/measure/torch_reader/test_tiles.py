"""Attention in tiles and oneDNN's products: against float64, whatever the tiles, threads and sizes of scores."""

import pytest
import torch
from ropewalk.runtime.measure.torch_reader import attention, onednn, tiles

if not onednn.covers(torch.empty(0)):
    pytest.skip("torch was built without oneDNN", allow_module_level=True)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def heads(n_rows, n_keys, n_kv=3, group=2, size=32):
    torch.manual_seed(n_rows)
    q, grad = 2 * torch.randn(2, n_kv, group, n_rows, size)
    k, v = torch.randn(2, n_kv, 1, n_keys, size)
    return q, 2 * k, v, grad


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("n_rows", "n_keys", "group"), [(150, 150, 1), (70, 200, 3), (1, 90, 2), (129, 1300, 2)])
@pytest.mark.parametrize("small", [False, True])
def test_results_and_gradients_are_those_in_float64(monkeypatch, n_rows, n_keys, group, small):
    if small:
        for name, value in (("KEYS", 48), ("ROWS", 32), ("LEAST_ROWS", 16), ("MOST_ROWS", 32)):
            monkeypatch.setattr(tiles, name, value)
    q, k, v, grad = heads(n_rows, n_keys, group=group)
    exact = attention.attend(q.double(), k.double(), v.double(), 0.2)
    found = tiles.attend_tiles(q, k, v, 0.2)
    assert error(found[0], exact.out) < 3e-6 and error(found[1], exact.log_sum) < 1e-6
    ours = tiles.attend_tiles_backward(grad, q, k, v, *found, 0.2)
    theirs = attention.attend_backward(grad.double(), q.double(), k.double(), v.double(), exact, 0.2)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.shape == expected.shape and error(got, expected) < 5e-6
    again = tiles.attend_tiles_backward(grad, q, k, v, *found, 0.2)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


@pytest.mark.parametrize("n_threads", [1, 3, 4])
def test_the_number_of_threads_makes_no_difference(n_threads):
    q, k, v, grad = heads(700, 700, n_kv=2)
    found = tiles.attend_tiles(q, k, v, 0.2)
    gradients = tiles.attend_tiles_backward(grad, q, k, v, *found, 0.2)
    torch.set_num_threads(n_threads)
    try:
        other = tiles.attend_tiles(q, k, v, 0.2)
        torch.testing.assert_close(other, found)
        torch.testing.assert_close(
            tiles.attend_tiles_backward(grad, q, k, v, *found, 0.2), gradients, atol=1e-4, rtol=1e-4
        )
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize(("score", "fits"), [(50.0, True), (120.0, False)])
def test_earlier_scores_may_be_far_larger_than_a_rows_own(score, fits):
    """Scores of the first key, above all others; in base 2 they are half as large again, and 128 are too many."""
    q, k, v, _ = heads(600, 600)
    k[:, :, 0, 0], k[:, :, 1:, 0], q[..., 0] = score / 0.2, 0, 1
    found, exact = tiles.attend_tiles(q, k, v, 0.2), attention.attend(q.double(), k.double(), v.double(), 0.2)
    assert (found is not None) == fits
    assert error(attention.attend(q, k, v, 0.2).out, exact.out) < 1e-5


def test_linear_is_torchs_and_its_gradient():
    torch.manual_seed(1)
    x, weight, bias = torch.randn(70, 48, requires_grad=True), torch.randn(96, 48), torch.randn(96)
    grad = torch.randn(70, 96)
    for b in (None, bias):
        ours, theirs = onednn.linear(x, weight, b), torch.nn.functional.linear(x, weight, b)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        (found,), (expected,) = (torch.autograd.grad(out, x, grad) for out in (ours, theirs))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    exact = onednn.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(exact, x.double() @ weight.double().T + bias.double())
