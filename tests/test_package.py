"""What the package promises beside its behaviour: its list of folders, its public names, and its typed marker."""

from pathlib import Path

import pytest
import ropewalk

ROOT = Path(__file__).parent.parent
NOT_CODE = {"tests", "benchmarks", "docs", "examples", "build", "dist"}


def test_pyproject_lists_every_folder_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    places = [path.parent.relative_to(ROOT) for path in ROOT.rglob("__init__.py")]
    code = [place for place in places if not any(part in NOT_CODE or part[0] == "." for part in place.parts)]
    assert sorted(listed) == sorted(".".join(("ropewalk", *place.parts)) for place in code)


def test_pyproject_lists_every_source_of_the_kernels():
    """What is not listed is missing in a source distribution, and then nothing is compiled."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    (kernels,) = settings["ext-modules"]
    for suffix, listed in (("c", kernels["sources"]), ("h", kernels["depends"])):
        there = [str(path.relative_to(ROOT)) for path in (ROOT / "runtime/graph/kernels").glob(f"*.{suffix}")]
        assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("name", ropewalk.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ropewalk, name).__doc__ and name in dir(ropewalk)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="no attribute 'Rope'"):
        _ = ropewalk.Rope
