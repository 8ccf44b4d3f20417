"""What control groups leave of the memory."""

from __future__ import annotations

from pathlib import Path

from ropewalk.runtime.free_memory import available_memory, group_room


def written(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")


def test_every_group_up_to_the_root(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("0::/user.slice/app\n")
    written(groups, memory_max="max", memory_current=500)
    written(groups / "user.slice", memory_max=1000, memory_current=700)
    written(groups / "user.slice" / "app", memory_max=900, memory_current=600, memory_stat="anon 1\ninactive_file 50")
    assert list(group_room(groups, own)) == [350, 300]


def test_the_older_hierarchy(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    for folder, limit in (("memory", 1 << 40), ("memory/docker/abc", 800)):
        written(groups / folder)
        (groups / folder / "memory.limit_in_bytes").write_text(f"{limit}")
        (groups / folder / "memory.usage_in_bytes").write_text("500")
    assert list(group_room(groups, own)) == [300, (1 << 40) - 500]


def test_paths_of_the_host_leave_the_root(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/system.slice/docker-abc.scope\n")
    written(tmp_path / "groups", memory_max=1000, memory_current=1)
    assert list(group_room(tmp_path / "groups", tmp_path / "own")) == [999]


def test_no_groups(tmp_path: Path) -> None:
    assert list(group_room(tmp_path / "none", tmp_path / "none")) == []
    assert available_memory() > 0
