"""Cached keys rotated in native code: against float64, for every type, instruction set and kind of pair."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from ropewalk.runtime.graph import ggml, kernels
from ropewalk.runtime.graph.kernels import KeyCache, KeyRotation

LIB = Path(llama_cpp.__file__).parent / "lib"
SETS = kernels.instruction_sets()
TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q5_1": 7, "Q5_0": 6, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 20}
PRECISION = {"F32": 1e-6, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 6e-3, "Q5_1": 0.05, "Q5_0": 0.05}
"""What a type keeps of values drawn from a normal distribution, relative to their norm; types of 4 bits: 0.1."""

N_CELLS, BASE = 200, 10000.0

pytestmark = pytest.mark.skipif(not SETS, reason=kernels.why_missing() or "no instruction set")
each_set = pytest.mark.parametrize("instructions", SETS, ids=[one.name for one in SETS])


class Keys:
    """A layer's cache of our own; `values` is what it holds, shape ``(cells, heads, head size)``."""

    def __init__(self, kind, n_heads, head_size, hadamard=0, seed=5):
        self.kind, self.hadamard = kind, hadamard
        self.shape = (N_CELLS, n_heads, head_size)
        self.base = ctypes.CDLL(str(LIB / "libggml-base.so"))
        lib, code = ggml._library(), TYPES[kind]
        block, n_bytes = int(lib.ggml_blck_size(code)), int(lib.ggml_type_size(code))
        row = n_heads * head_size // block * n_bytes
        self.bytes = np.zeros(N_CELLS * row, np.uint8)
        self.cache = KeyCache(self.bytes.ctypes.data, row, n_heads, head_size, code, hadamard)
        drawn = np.random.default_rng(seed).normal(size=self.shape)
        self.write(drawn)

    def write(self, values):
        """Store values as ggml's tools do, transformed."""
        values = np.ascontiguousarray(self._transformed(values), dtype=np.float32)
        if self.kind == "F32":
            self.bytes[:] = values.view(np.uint8).ravel()
            return
        quantise = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        quantise(ggml.quantiser(TYPES[self.kind]))(values.ctypes.data, self.bytes.ctypes.data, values.size)

    @property
    def values(self):
        """What the cache holds, in float64."""
        if self.kind == "F32":
            stored = self.bytes.view(np.float32).copy()
        elif self.kind == "F16":
            stored = self.bytes.view(np.float16).astype(np.float32)
        elif self.kind == "BF16":
            stored = (self.bytes.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            stored = np.empty(self.shape, np.float32)
            block = ggml.block_type(TYPES[self.kind])
            block.dequantise(self.bytes.ctypes.data, stored.ctypes.data, stored.size)
        return self._transformed(stored.reshape(self.shape).astype(np.float64))

    def _transformed(self, values):
        if not self.hadamard:
            return values
        matrix = np.ones((1, 1))
        while len(matrix) < self.hadamard:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        grouped = values.reshape(*self.shape[:2], -1, self.hadamard) @ (matrix / np.sqrt(self.hadamard))
        return grouped.reshape(self.shape)


def angles(factors, n_rot):
    """The angles of ggml's ROPE, which it computes in floats: shape ``(cells, pairs)``."""
    theta, scale = np.arange(N_CELLS, dtype=np.float32), np.float32(BASE) ** np.float32(-2 / n_rot)
    found = np.empty((N_CELLS, n_rot // 2), np.float32)
    for i, factor in enumerate(np.asarray(factors, np.float32)):
        found[:, i] = theta / factor
        theta = theta * scale
    return found.astype(np.float64)


def rotated(values, n_rot, halves, rotations, scale=1.0):
    """`values` rotated in float64, shape ``(cells, heads, head size)``."""
    result, turned = values.copy(), np.zeros((N_CELLS, n_rot // 2))
    for one in rotations:
        turned[one.start : one.stop] = (angles(one.after, n_rot) - angles(one.before, n_rot))[one.start : one.stop]
    where = (
        [np.arange(n_rot // 2), np.arange(n_rot // 2, n_rot)] if halves else [slice(0, n_rot, 2), slice(1, n_rot, 2)]
    )
    a, b = (values[..., index] for index in where)
    cosine, sine = np.cos(turned)[:, None] * scale, np.sin(turned)[:, None] * scale
    result[..., where[0]] = a * cosine - b * sine
    result[..., where[1]] = a * sine + b * cosine
    return result


def band(n_rot, most):
    return tuple(np.linspace(1, most, n_rot // 2).tolist())


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def rotate(instructions, keys, n_rot, halves, rotations, scale=1.0, n_threads=1):
    context = kernels.Context(instructions)
    assert context.can_rotate(keys.cache, n_rot)
    settings = {"n_cells": N_CELLS, "n_rot": n_rot, "freq_base": BASE, "scale": scale, "halves": halves}
    context.rotate([keys.cache], rotations, n_threads=n_threads, **settings)


SHAPES = [(1, 16, 16), (3, 64, 64), (2, 80, 80), (2, 96, 48), (4, 128, 128), (1, 128, 36), (2, 256, 64), (1, 256, 256)]


@each_set
@pytest.mark.parametrize("halves", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize("kind", TYPES)
def test_keys_are_rotated_as_in_float64(instructions, kind, halves):
    for n_heads, head_size, n_rot in SHAPES:
        block = int(ggml._library().ggml_blck_size(TYPES[kind]))
        if head_size % block:
            continue
        for hadamard in (0, 64) if block > 1 and head_size % 64 == 0 else (0,):
            keys, rotations = (
                Keys(kind, n_heads, head_size, hadamard),
                [KeyRotation(0, N_CELLS, band(n_rot, 1), band(n_rot, 6))],
            )
            expected = rotated(keys.values, n_rot, halves, rotations, 1.25)
            rotate(instructions, keys, n_rot, halves, rotations, 1.25)
            assert distance(keys.values, expected) < PRECISION.get(kind, 0.1), (n_heads, head_size, n_rot, hadamard)


@each_set
@pytest.mark.parametrize("kind", TYPES)
def test_they_are_rounded_as_by_ggml(instructions, kind):
    keys, again = Keys(kind, 2, 64), Keys(kind, 2, 64)
    rotations = [KeyRotation(0, N_CELLS, band(64, 1), band(64, 4))]
    again.write(rotated(keys.values, 64, False, rotations))
    rotate(instructions, keys, 64, False, rotations)
    # The last bits of a float may fall on the other side of a tie.
    assert (keys.bytes != again.bytes).mean() < (0.3 if kind == "F32" else 0.01)
    assert distance(keys.values, again.values) < 1e-3


@each_set
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_a_transform_of_any_size_is_undone_and_done_again(instructions, size):
    keys, rotations = Keys("F32", 2, 256, size), [KeyRotation(0, N_CELLS, band(256, 1), band(256, 3))]
    expected = rotated(keys.values, 256, True, rotations)
    rotate(instructions, keys, 256, True, rotations)
    assert distance(keys.values, expected) < 1e-6


def test_runs_of_cells_and_those_outside_of_them():
    rotations = [KeyRotation(4, 16, band(64, 1), band(64, 3)), KeyRotation(16, 150, band(64, 2), band(64, 3))]
    keys = Keys("F32", 2, 64)
    expected = rotated(keys.values, 64, False, rotations)
    rotate(None, keys, 64, False, rotations)
    assert distance(keys.values, expected) < 1e-6
    before = Keys("Q4_0", 2, 64)
    keys = Keys("Q4_0", 2, 64)
    rotate(None, keys, 64, False, rotations)
    same = keys.bytes.reshape(N_CELLS, -1) == before.bytes.reshape(N_CELLS, -1)
    assert same[:4].all() and same[150:].all() and not same[4:150].all(axis=1).any()


def test_all_cells_are_scaled_whether_they_rotate_or_not():
    keys = Keys("F32", 2, 64)
    expected = rotated(keys.values, 64, False, [], 0.5)
    rotate(None, keys, 64, False, [], 0.5)
    assert distance(keys.values, expected) < 1e-7
    keys = Keys("F32", 2, 64)
    some = [KeyRotation(16, 20, band(64, 1), band(64, 3))]
    expected = rotated(keys.values, 64, False, some, 1.5)
    rotate(None, keys, 64, False, some, 1.5)
    assert distance(keys.values, expected) < 1e-6


def test_the_number_of_threads_changes_nothing():
    bytes_found = []
    for n_threads in (1, 3, 16):
        keys = Keys("Q8_0", 3, 64, 64)
        rotate(None, keys, 64, True, [KeyRotation(0, N_CELLS, band(64, 1), band(64, 4))], n_threads=n_threads)
        bytes_found.append(keys.bytes)
    assert all((found == bytes_found[0]).all() for found in bytes_found)


def test_many_rotations_up_and_down_stay_where_they_were():
    keys = Keys("F32", 2, 64)
    before, up, down = keys.values, band(64, 1), band(64, 8)
    for _ in range(20):
        rotate(None, keys, 64, False, [KeyRotation(0, N_CELLS, up, down)])
        rotate(None, keys, 64, False, [KeyRotation(0, N_CELLS, down, up)])
    assert distance(keys.values, before) < 1e-5


def test_what_cannot_be_rotated():
    context, keys = kernels.Context(), Keys("Q8_0", 2, 64)
    cache = keys.cache
    assert context.can_rotate(cache, 64)
    assert not context.can_rotate(cache, 66)  # more than a head has
    assert not context.can_rotate(cache, 7)
    assert not context.can_rotate(KeyCache(cache.data, cache.cell_bytes, 2, 64, 8, 48), 64)  # no such transform
    assert not context.can_rotate(KeyCache(cache.data, cache.cell_bytes, 2, 64, 26), 64)  # whole numbers
    assert not context.can_rotate(KeyCache(cache.data, cache.cell_bytes, 2, 48, 8), 48)  # heads share a block
