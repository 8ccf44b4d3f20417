"""The self-test passes here, natively and in torch, and notices each thing that it is there to notice."""

import ctypes

import numpy as np
import pytest
from ropewalk.errors import UserError
from ropewalk.runtime import self_test
from ropewalk.runtime.graph import attention_jobs, ggml, rope
from ropewalk.runtime.graph.kernels import Context, why_missing
from ropewalk.runtime.self_test import Failure

needs_kernels = pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")


@pytest.fixture
def in_torch(monkeypatch):
    monkeypatch.setenv("ROPEWALK_KERNELS", "0")


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)])
def test_it_passes(tmp_path, monkeypatch, native):
    monkeypatch.setenv("ROPEWALK_KERNELS", str(int(native)))
    self_test._check_rotation(tmp_path / "plain.gguf")
    self_test._check_taken_nodes(tmp_path / "quantised.gguf")


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize(
    ("owner", "name", "replacement", "says"),
    [
        (rope, "rotation_factors", lambda old, new: (rope.STILL,) * len(old), "does not rotate cached keys"),
        (rope.RopeHook, "set_rotation", lambda self, node, **_: None, "cannot be rotated"),
    ],
)
def test_a_rotation_that_does_not_happen(tmp_path, monkeypatch, owner, name, replacement, says, native):
    monkeypatch.setenv("ROPEWALK_KERNELS", str(int(native)))
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(Failure, match=says):
        self_test._check_rotation(tmp_path / "plain.gguf")


@needs_kernels
def test_keys_that_the_kernels_do_not_rotate(tmp_path, monkeypatch):
    monkeypatch.setattr(Context, "rotate", lambda self, *_, **__: None)
    with pytest.raises(Failure, match="kernels do not rotate cached keys"):
        self_test._check_rotation(tmp_path / "plain.gguf")


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_kernels)])
def test_an_attention_factor_that_is_not_set(tmp_path, monkeypatch, native):
    monkeypatch.setenv("ROPEWALK_KERNELS", str(int(native)))
    use = rope.RopeHook.use
    monkeypatch.setattr(rope.RopeHook, "use", lambda self, factors, attention: use(self, factors, 1.0))
    with pytest.raises(Failure, match="come out wrong"):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")


def test_a_scale_that_is_read_from_the_wrong_place(tmp_path, monkeypatch, in_torch):
    make = attention_jobs.Node.__init__

    def wrong(self, address, windowed):
        make(self, address, windowed)
        self.scale *= 2

    monkeypatch.setattr(attention_jobs.Node, "__init__", wrong)
    with pytest.raises(Failure, match="taken over come out wrong"):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")


def test_nodes_that_are_not_taken_over(tmp_path, monkeypatch, in_torch):
    monkeypatch.setattr(ggml, "take_over", lambda address, function: None)
    with pytest.raises(Failure, match="cannot be taken over"):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")


# --- the kernels

See = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


def spoil_nodes(monkeypatch, op, few_rows, spoil):
    """Let `spoil` change each node of one operation and number of rows that the kernels have seen."""
    code, see = ggml.op_code(op), Context.see.fget

    def spoiled(node, ask, address):
        tensor = ggml.tensor_at(node)
        right = tensor.op == code and (tensor.ne[2 if op == "FLASH_ATTN_EXT" else 1] == 1) == few_rows
        result = See(see(kernels))(node, ask, address)
        if right:
            spoil(node)
        return result

    kept = See(spoiled)
    kernels = Context()
    monkeypatch.setattr(Context, "see", property(lambda self: ctypes.cast(kept, ctypes.c_void_p).value))
    return kept


@needs_kernels
def test_rope_nodes_that_the_kernels_do_not_set(tmp_path, monkeypatch):
    watch = Context.watch
    monkeypatch.setattr(Context, "watch", lambda self, setting, nodes: watch(self, None, nodes))
    # Llama notices that itself, before it gives a result.
    with pytest.raises(UserError, match="no ROPE node"):
        self_test._check_rotation(tmp_path / "plain.gguf")


@needs_kernels
def test_factors_that_the_kernels_do_not_read(tmp_path, monkeypatch):
    def reset(node):
        ggml.tensor_at(node).src[2] = None

    kept = spoil_nodes(monkeypatch, "ROPE", False, reset)
    with pytest.raises(Failure, match="by our factors"):
        self_test._check_rotation(tmp_path / "plain.gguf")
    del kept


@needs_kernels
def test_nodes_that_the_kernels_do_not_take_over(tmp_path, monkeypatch):
    watch = Context.watch
    monkeypatch.setattr(Context, "watch", lambda self, setting, nodes: watch(self, setting, False))
    with pytest.raises(Failure, match="cannot be taken over"):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")


@needs_kernels
@pytest.mark.parametrize(
    ("few_rows", "says"), [(False, "taken over come out wrong"), (True, "read by itself comes out wrong")]
)
def test_attention_that_the_kernels_compute_wrongly(tmp_path, monkeypatch, few_rows, says):
    def double(node):
        ggml.custom_params(node).attention.scale *= 2

    kept = spoil_nodes(monkeypatch, "FLASH_ATTN_EXT", few_rows, double)
    with pytest.raises(Failure, match=says):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")
    del kept


def test_numbers_that_are_not_finite_fail():
    with pytest.raises(Failure, match="inf"):
        self_test._compare(np.array([1.0, np.nan]), np.ones(2), "losses")
