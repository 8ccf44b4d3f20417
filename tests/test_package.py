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


@pytest.mark.parametrize("name", ropewalk.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ropewalk, name).__doc__ and name in dir(ropewalk)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="no attribute 'Rope'"):
        _ = ropewalk.Rope
