"""Who is measured against whom, and how each measures one thing in a process of its own.

Ropewalk ("ours") and stock llama-cpp-python are always there. `--tree NAME=FOLDER` adds another checkout of Ropewalk,
an older commit for example, and `--llama-bench NAME=COMMAND` a program with llama-bench's options and JSON, llama.cpp's
own or ik_llama.cpp's; options of its own may follow the path: `--llama-bench "ik=build/bin/llama-bench -mqkv 1"`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

ENVIRONMENT = dict(os.environ)  # as it was: importing Ropewalk sets how its own threads wait, not everybody's
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """What one process measures: `count` tokens, read at once or written one by one, after `depth` tokens."""

    kind: str  # "read" or "write"
    count: int
    depth: int
    model: Path
    threads: int


class Contender(Protocol):
    """Somebody who is measured, with one cache type and one way of running."""

    name: str
    kv: str

    @property
    def label(self) -> str: ...

    def measure(self, task: Task, states: Path) -> float:
        """Return tokens per second; `states` is a folder for caches that are filled once."""


@dataclass(frozen=True)
class Engine:
    """Ropewalk, or stock llama-cpp-python (`package` is "llama_cpp"), with flash attention or without."""

    name: str
    package: str
    kv: str
    flash_attn: bool = True
    tree: Path | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.kv}" + ("" if self.flash_attn else ", no flash attention")

    def measure(self, task: Task, states: Path) -> float:
        state = filled(self.kv, self.flash_attn, task, states) if task.depth else None
        return task.count / self.run(task, state=state)

    def run(self, task: Task, **files: Path | None) -> float:
        """Run engine_process.py; return the seconds that it measured."""
        job = asdict(task) | {"package": self.package, "kv": self.kv, "flash_attn": self.flash_attn} | files
        with tempfile.TemporaryDirectory() as folder:
            environment = dict(ENVIRONMENT)
            if self.tree is not None:
                (Path(folder) / "ropewalk").symlink_to(self.tree.resolve())
                environment["PYTHONPATH"] = folder
            command = [sys.executable, str(HERE / "engine_process.py"), json.dumps(job, default=str)]
            return float(last_line(command, environment))


@dataclass(frozen=True)
class LlamaBench:
    """A program that measures itself: it fills its cache each time."""

    name: str
    command: tuple[str, ...]
    kv: str
    options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join((self.name, self.kv, *self.options))

    def measure(self, task: Task, states: Path) -> float:
        type_k, type_v = types(self.kv)
        command = [*self.command, *self.options, "-m", str(task.model), "-t", str(task.threads), "-fa", "1"]
        command += ["-ctk", type_k, "-ctv", type_v, "-r", "1", "-o", "json", "-p", "0"]
        if task.kind == "read":
            command += ["-n", "0", "-p", str(task.count)]
        elif "--n-depth" in help_of(self.command[0]):
            command += ["-n", str(task.count), "-d", str(task.depth)]
        else:  # ik_llama.cpp
            command += ["-n", "0", "-gp", f"{task.depth},{task.count}"]
        found = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
        return float(json.loads(found[found.index("[") :])[-1]["avg_ts"])


def types(kv: str) -> tuple[str, str]:
    """The types of K and V in a cache type, "q8_0" or "q8_0:f16"."""
    return kv.split(":")[0], kv.split(":")[-1]


def last_line(command: list[str], environment: dict[str, str]) -> str:
    """The last line that a command prints; its messages are shown if it fails."""
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.stderr.write(ended.stderr)
        ended.check_returncode()
    return ended.stdout.splitlines()[-1]


@cache
def help_of(program: str) -> str:
    ended = subprocess.run([program, "--help"], env=ENVIRONMENT, capture_output=True, text=True)
    return ended.stdout + ended.stderr


def filled(kv: str, flash_attn: bool, task: Task, states: Path) -> Path:
    """The file with the state of `task.depth` tokens, read by our own tree, as stock would take hours with some types.

    All engines share it: what they read it with is the same llama-cpp-python. It is read on from the deepest state that
    is there already.
    """
    kind = f"{task.model.stem}-{kv.replace(':', '-')}-{'flash' if flash_attn else 'plain'}"
    found = states / f"{kind}-{task.depth}.state"
    if not found.exists():
        depths = [int(path.stem.rsplit("-", 1)[1]) for path in states.glob(f"{kind}-*.state")]
        start = max((depth for depth in depths if depth < task.depth), default=0)
        job = replace(task, kind="fill", depth=start, count=task.depth - start)
        state = states / f"{kind}-{start}.state" if start else None
        Engine("ours", "ropewalk", kv, flash_attn).run(job, state=state, save=found)
    return found


def add_options(parser: argparse.ArgumentParser, kv: str) -> None:
    """The options that say who is measured."""
    parser.add_argument("--model", type=Path, default=None, help="default: the bundled SmolLM2")
    parser.add_argument("--kv", default=kv, help="cache types, separated by commas (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=FOLDER", help="another tree of Ropewalk")
    parser.add_argument(
        "--llama-bench", action="append", default=[], metavar="NAME=COMMAND", help="a program like llama-bench"
    )
    parser.add_argument("--only", default=None, metavar="NAMES", help="measure these alone, as in ours,stock,ik")


def contenders(args: argparse.Namespace) -> list[Contender]:
    """All that the options name: ours and other trees by cache type, stock's settings, and other programs by theirs."""
    kvs = args.kv.split(",")
    found: list[Contender] = [Engine("ours", "ropewalk", kv) for kv in kvs]
    for name, folder in (each.split("=", 1) for each in args.tree):
        found += [Engine(name, "ropewalk", kv, tree=Path(folder)) for kv in kvs]
    found += [Engine("stock", "llama_cpp", kv) for kv in dict.fromkeys([*kvs, "f16"])]
    found.append(Engine("stock", "llama_cpp", "f16", flash_attn=False))
    for name, line in (each.split("=", 1) for each in args.llama_bench):
        command = tuple(shlex.split(line))
        repacked = "-rtr" in help_of(command[0])  # ik_llama.cpp: weights repacked when they are loaded, or not
        settings = [("-rtr", "0"), ("-rtr", "1")] if repacked else [()]
        found += [LlamaBench(name, command, kv, options) for kv in kvs for options in settings]
    only = args.only.split(",") if args.only else [each.name for each in found]
    return [each for each in found if each.name in only]
