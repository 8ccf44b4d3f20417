"""ggml's memory layout is verified, and an unknown one refused."""

import ctypes

import numpy as np
import pytest
from ropewalk.runtime.graph import ggml


def test_the_installed_layout_is_verified():
    ggml.check_layout()
    assert ggml.op_code("ROPE") != ggml.op_code("GET_ROWS")


def test_another_layout_is_refused_with_the_supported_version(monkeypatch):
    class Shifted(ctypes.Structure):
        _fields_ = (*ggml.TensorStruct._fields_[:1], ("new", ctypes.c_int64), *ggml.TensorStruct._fields_[1:])

    monkeypatch.setattr(ggml, "TensorStruct", Shifted)
    with pytest.raises(ggml.LayoutError, match=rf"supported: {ggml.SUPPORTED}") as caught:
        ggml.check_layout.__wrapped__()
    assert "\n" not in str(caught.value)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ggml.LayoutError, match="no operation TWIST"):
        ggml.op_code("TWIST")


def test_floats_of_our_own_are_tensors():
    arena = ggml.Arena(2 * ggml.floats_size(5))
    address = arena.floats([1.5, 2, 3, 4, 5])
    tensor = ggml.tensor_at(address)
    assert list(tensor.ne) == [5, 1, 1, 1]
    row = np.frombuffer((ctypes.c_float * 5).from_address(tensor.data), dtype=np.float32)
    np.testing.assert_array_equal(row, [1.5, 2, 3, 4, 5])
