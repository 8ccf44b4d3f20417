"""A short question from the shell: seconds and peak memory of `echo … | ropewalk chat MODEL --max-tokens 8`.

    python benchmarks/cold_start.py [--model FILE.gguf] [--max-tokens 8] [--tree NAME=FOLDER] [--rounds 5] [--json FILE]

Measured from the start of the process to its end, interleaved in rounds; medians count. Stock is a program of four
lines that asks llama-cpp-python the same. A first round, which reads the files into memory and fills what is remembered
of an engine, does not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from contenders import ENVIRONMENT
from models import bundled_model
from rounds import Readings, medians, print_table, write_json

QUESTION = "Name three colours of the rainbow."
STOCK = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=0, verbose=False)
messages = [{"role": "user", "content": sys.stdin.read()}]
print(llm.create_chat_completion(messages, max_tokens=int(sys.argv[2]))["choices"][0]["message"]["content"])
"""


@dataclass(frozen=True)
class Command:
    """One way to ask; `tree` is another folder of Ropewalk."""

    label: str
    arguments: tuple[str, ...]
    tree: Path | None = None

    def run(self) -> tuple[float, float]:
        """Ask; return seconds, and MiB at most."""
        with tempfile.TemporaryDirectory() as folder:
            environment = dict(ENVIRONMENT)
            if self.tree is not None:
                (Path(folder) / "ropewalk").symlink_to(self.tree.resolve())
                environment["PYTHONPATH"] = folder
            question = Path(folder) / "question"
            question.write_text(QUESTION)
            started = time.perf_counter()
            with question.open() as file:
                process = subprocess.Popen(self.arguments, stdin=file, stdout=subprocess.DEVNULL, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - started
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, self.arguments)
        return seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def commands(model: Path, max_tokens: int, trees: list[str]) -> list[Command]:
    ask = (sys.executable, "-m", "ropewalk", "chat", str(model), "--max-tokens", str(max_tokens))
    others = [Command(name, ask, Path(folder)) for name, folder in (tree.split("=", 1) for tree in trees)]
    stock = Command("stock", (sys.executable, "-c", STOCK, str(model), str(max_tokens)))
    return [Command("ours", ask), *others, stock]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=FOLDER", help="another tree of Ropewalk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    model = (args.model or bundled_model()).resolve()
    everybody = commands(model, args.max_tokens, args.tree)
    readings: Readings = {column: {each.label: [] for each in everybody} for column in ("seconds", "MiB")}
    for i in range(args.rounds + 1):
        for each in everybody:
            seconds, peak = each.run()
            if i:
                readings["seconds"][each.label].append(seconds)
                readings["MiB"][each.label].append(peak)
    found = medians(readings)
    print(f"a short question, process included; {model.name}, median of {args.rounds}")
    print_table({each.label: [row[each.label] for row in found.values()] for each in everybody}, list(readings), 2)
    print()
    others = [each.label for each in everybody[1:]]
    print_table({f"ours / {o}": [row["ours"] / row[o] for row in found.values()] for o in others}, list(readings), 2)
    write_json(args.json, readings, model=model, max_tokens=args.max_tokens)


if __name__ == "__main__":
    main()
