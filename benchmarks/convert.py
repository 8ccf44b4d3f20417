"""Time and memory of converting a checkpoint: ours compared with llama.cpp's own converter, interleaved.

    python benchmarks/convert.py CHECKPOINT --llama-cpp FOLDER --llama-cpp-python PYTHON [--types f16,bf16,q8_0]
                                 [--rounds 3]

FOLDER has llama.cpp's source (the source distribution of llama-cpp-python has it in vendor/), PYTHON runs its
converter; `make oracle` sets up both. Each conversion is a separate process, imports included; memory is the peak
resident size that the system reports. The best round counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and its peak MiB."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with code {child.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--llama-cpp-python", required=True)
    parser.add_argument("--types", default="f16,bf16,q8_0")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    script = str(args.llama_cpp / "convert_hf_to_gguf.py")
    source = str(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "out.gguf")
        print(f"{args.checkpoint.name}, {os.cpu_count()} cores; seconds and MiB, imports included")
        for kind in args.types.split(","):
            commands = {
                "ours": [sys.executable, "-m", "ropewalk", "convert", source, target, "--type", kind, "--force"],
                "llama.cpp's": [args.llama_cpp_python, script, source, "--outfile", target, "--outtype", kind],
            }
            best = dict.fromkeys(commands, (float("inf"), float("inf")))
            for _ in range(args.rounds):
                for name, command in commands.items():
                    Path(target).unlink(missing_ok=True)
                    best[name] = tuple(map(min, best[name], measure(command)))  # type: ignore[assignment]
            (ours, our_memory), (theirs, their_memory) = best.values()
            print(
                f"{kind:5} ours {ours:6.1f} s {our_memory:6,.0f} MiB   llama.cpp's {theirs:6.1f} s {their_memory:6,.0f}"
                f" MiB   {theirs / ours:.2f} x as fast, {our_memory / their_memory:.2f} of the memory"
            )


if __name__ == "__main__":
    main()
