"""Which ROPE node a node's values come from: followed back through the graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from . import ggml

SHAPES = ("RESHAPE", "VIEW", "PERMUTE", "CONT", "SCALE")
"""Operations that leave values as they are, or multiply all by one factor, as a rotation does not mind."""


class RopeTrace:
    """Follows values back to their rotation, through changes of shape and at most one Hadamard transform.

    llama.cpp puts a transform behind the rotation of keys that it will quantise, and of their queries.
    """

    def __init__(self) -> None:
        self._transforms: dict[int, int] = {}

    def rope_behind(self, node: int | None) -> tuple[int | None, int]:
        """Return the ROPE node that a node's values come from, if any, and the size of the transform in between."""
        hadamard = 0
        while node:
            tensor = ggml.tensor_at(node)
            name = ggml.op_name(tensor.op)
            source = tensor.src[0]
            if name == "ROPE":
                return node, hadamard
            if name in ("MUL_MAT", "CUSTOM") and not hadamard:  # the latter if the product was taken over
                hadamard = self._transform(source)
                if not hadamard:
                    break
                source = tensor.src[1]
            elif name not in SHAPES or (name == "SCALE" and ggml.scale_bias(node)):
                break
            if source is None or ggml.n_values(ggml.tensor_at(source)) != ggml.n_values(tensor):
                break
            node = source
        return None, 0

    def cache_behind(self, node: int | None) -> int | None:
        """Return the tensor without an operation that a node's values are those of; None if anything is computed."""
        while node:
            tensor = ggml.tensor_at(node)
            name = ggml.op_name(tensor.op)
            if name == "NONE":
                return node
            if tensor.view_src:
                node = tensor.view_src
            elif name in ("MUL_MAT", "CUSTOM") and self._transform(tensor.src[0]):
                node = tensor.src[1]
            else:
                node = tensor.src[0] if name in (*SHAPES, "CPY") else None
        return None

    def rope_before(self, node: int | None, applies: Callable[[int], bool]) -> bool:
        """Whether there is a ROPE node that `applies` anywhere before a node, whatever else lies between."""
        while node:
            tensor = ggml.tensor_at(node)
            if ggml.op_name(tensor.op) == "ROPE":
                return applies(node)
            first, second = tensor.src[0], tensor.src[1]
            is_weight = second and first and ggml.op_name(ggml.tensor_at(first).op) == "NONE"
            node = second if is_weight else first
        return False

    def _transform(self, node: int) -> int:
        """Return the size of the Walsh-Hadamard matrix that a tensor holds; 0 for any other tensor."""
        if node not in self._transforms:
            self._transforms[node] = _hadamard_size(ggml.tensor_at(node))
        return self._transforms[node]


def _hadamard_size(tensor: ggml.TensorStruct) -> int:
    size: int = tensor.ne[0]
    if tensor.type != 0 or list(tensor.ne) != [size, size, 1, 1] or size < 2 or size & (size - 1) or not tensor.data:
        return 0
    found = ggml.values(tensor)
    return size if found is not None and np.allclose(found[0, 0], hadamard(size), rtol=1e-5) else 0


def hadamard(size: int) -> npt.NDArray[np.float64]:
    """Return the orthonormal Walsh-Hadamard matrix in natural order, its own inverse, for a power of two."""
    matrix: npt.NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size))
