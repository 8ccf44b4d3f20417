"""Several files instead of one: how llama.cpp reads them, their sizes, and what is left after a failure."""

import shutil

import gguf
import llama_cpp
import numpy as np
import pytest
import ropewalk
from ropewalk.container import model_parts, read_header
from ropewalk.convert import convert_model
from ropewalk.convert.split import in_parts, parse_size, split_model
from ropewalk.errors import UserError


@pytest.fixture
def model(tiny_llama, tmp_path):
    return tiny_llama(tmp_path / "in.gguf")


def logits(path):
    llm = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    llm.eval(list(range(3, 20)))
    found = np.array(llm.scores[:17])
    llm.close()
    return found


def test_llama_cpp_reads_the_parts_as_one_model(model, tmp_path):
    tensors = read_header(model).tensors
    limit = max(max(t.n_bytes for t in tensors), sum(t.n_bytes for t in tensors) // 3)
    seen = []
    names = split_model(model, tmp_path / "out.gguf", limit, on_progress=lambda *n: seen.append(n))
    n = len(names)
    assert n >= 3 and [p.name for p in names] == [f"out-{i + 1:05d}-of-{n:05d}.gguf" for i in range(n)]
    assert seen[-1][0] == seen[-1][1] and sorted(seen) == seen
    found = [t for name in names for t in gguf.GGUFReader(name).tensors]
    assert [t.name for t in found] == [t.name for t in tensors]
    assert all(sum(t.n_bytes for t in gguf.GGUFReader(name).tensors) <= limit for name in names)
    assert np.array_equal(logits(names[0]), logits(model))


def test_one_file_is_enough(model, tmp_path):
    assert split_model(model, tmp_path / "out.gguf", 1 << 40) == (tmp_path / "out.gguf",)
    assert (tmp_path / "out.gguf").read_bytes() == model.read_bytes()


def test_mistakes(model, tmp_path):
    with pytest.raises(UserError, match=r"split size: 100 bytes, expected at least the [\d,]+ of \S+ alone"):
        split_model(model, tmp_path / "out.gguf", 100)
    limit = max(t.n_bytes for t in read_header(model).tensors)
    n = len(split_model(model, tmp_path / "out.gguf", limit))
    (tmp_path / f"out-00001-of-{n:05d}.gguf").unlink()
    with pytest.raises(UserError, match="already exists"):
        split_model(model, tmp_path / "out.gguf", limit)
    assert not (tmp_path / f"out-00001-of-{n:05d}.gguf").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
    assert len(split_model(model, tmp_path / "out.gguf", limit, force=True)) == n


@pytest.mark.parametrize(("text", "size"), [("500", 500), ("3k", 3000), ("2M", 2_000_000), ("1G", 10**9)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "2T", "1.5G", "G"])
def test_invalid_sizes(text):
    with pytest.raises(UserError, match="expected a number like 500M or 2G"):
        parse_size(text)


def test_parts_are_run_and_measured_as_one_model(model, tmp_path):
    limit = max(t.n_bytes for t in read_header(model).tensors)
    names = split_model(model, tmp_path / "out.gguf", limit)
    whole, first = read_header(model), read_header(names[0])
    assert [t.name for part in model_parts(first) for t in part.tensors] == [t.name for t in whole.tensors]
    assert model_parts(whole) == (whole,)
    llm = ropewalk.Llama(str(names[0]), n_ctx=64, verbose=False)
    assert llm.plan.weights_bytes == sum(t.n_bytes for t in whole.tensors)
    llm.close()


def test_a_part_that_is_not_the_first_and_one_that_is_missing(model, tmp_path):
    names = split_model(model, tmp_path / "out.gguf", max(t.n_bytes for t in read_header(model).tensors))
    with pytest.raises(UserError, match=f"out-00002.*: one of {len(names)} parts of a model, expected the first"):
        model_parts(read_header(names[1]))
    names[0].rename(tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"other\.gguf: one of"):
        model_parts(read_header(tmp_path / "other.gguf"))
    (tmp_path / "other.gguf").rename(names[0])
    names[1].unlink()
    with pytest.raises(UserError, match=r"out-00002.*cannot read"):
        model_parts(read_header(names[0]))


def test_a_second_run_leaves_the_first_ones_files_alone(model, tmp_path):
    target, limit = tmp_path / "out.gguf", max(t.n_bytes for t in read_header(model).tensors)

    def second(_):
        raise AssertionError("started while another run is writing")

    def first(whole):
        shutil.copy(model, whole)
        with pytest.raises(UserError, match=r"out.gguf: another run is writing it"):
            in_parts(second, target, limit)
        assert whole.read_bytes() == model.read_bytes()

    names = in_parts(first, target, limit)
    assert sorted(tmp_path.iterdir()) == sorted([model, *names])


def test_what_a_killed_run_left_is_replaced(model, tmp_path):
    for name in (".out.gguf.whole.part", ".out.gguf.whole.claim.part"):
        (tmp_path / name).write_bytes(b"half")
    limit = max(t.n_bytes for t in read_header(model).tensors)
    names = in_parts(
        lambda whole: convert_model(model, whole, weight_type="f16", force=True), tmp_path / "out.gguf", limit
    )
    assert sorted(tmp_path.iterdir()) == sorted([model, *names])


def test_messages_name_the_output_and_not_the_file_beside_it(model, tmp_path):
    def convert(whole):
        assert whole.name.startswith(".")
        raise UserError(f"{whole}: cannot write: the disk is full")

    with pytest.raises(UserError) as error:
        in_parts(convert, tmp_path / "out.gguf", 1 << 30)
    assert str(error.value) == f"{tmp_path / 'out.gguf'}: cannot write: the disk is full"
    assert list(tmp_path.iterdir()) == [model]
