"""The self-test passes here, and notices each thing that it is there to notice."""

import numpy as np
import pytest
from ropewalk.runtime import self_test
from ropewalk.runtime.graph import attention_jobs, ggml, rope
from ropewalk.runtime.self_test import Failure


def test_it_passes(tmp_path):
    self_test._check_rotation(tmp_path / "plain.gguf")
    self_test._check_taken_nodes(tmp_path / "quantised.gguf")


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "says"),
    [
        (rope, "rotation_factors", lambda old, new: (rope.STILL,) * len(old), "does not rotate cached keys"),
        (rope.RopeHook, "set_rotation", lambda self, node, **_: None, "cannot be rotated"),
    ],
)
def test_a_rotation_that_does_not_happen(tmp_path, monkeypatch, owner, name, replacement, says):
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(Failure, match=says):
        self_test._check_rotation(tmp_path / "plain.gguf")


def test_an_attention_factor_that_is_not_set(tmp_path, monkeypatch):
    use = rope.RopeHook.use
    monkeypatch.setattr(rope.RopeHook, "use", lambda self, factors, attention: use(self, factors, 1.0))
    with pytest.raises(Failure, match="come out wrong"):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")


def test_a_scale_that_is_read_from_the_wrong_place(tmp_path, monkeypatch):
    make = attention_jobs.Node.__init__

    def wrong(self, address):
        make(self, address)
        self.scale *= 2

    monkeypatch.setattr(attention_jobs.Node, "__init__", wrong)
    with pytest.raises(Failure, match="taken over come out wrong"):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")


def test_nodes_that_are_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(ggml, "take_over", lambda address, function: None)
    with pytest.raises(Failure, match="cannot be taken over"):
        self_test._check_taken_nodes(tmp_path / "quantised.gguf")


def test_numbers_that_are_not_finite_fail():
    with pytest.raises(Failure, match="inf"):
        self_test._compare(np.array([1.0, np.nan]), np.ones(2), "losses")
