"""Peak memory of reading the last tokens of a full context: ours against stock llama-cpp-python, a process each.

    python benchmarks/memory.py [--model FILE.gguf] [--text FILE] [--kv q8_0] [--context 32768] [--threads 2]

The context is read once and its cache handed over as a file; each process takes it up, and its peak is counted from
there on while it reads the last 512 tokens. torch is imported in both, and what that costs is printed by itself: stock
alone would not need it. Linux only (it resets the peak in /proc).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = 512


def status(name: str) -> int:
    """A number of bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def read_last_block(model: str, kv: str, context: int, threads: int, kept: str, fast: bool) -> int:
    """Bytes at the peak of reading the last block of `context` tokens, from a session file without them."""
    import ropewalk
    import torch  # noqa: F401
    from ropewalk.factors import read_schedule
    from ropewalk.runtime import session

    llm = ropewalk.Llama(
        model,
        schedule=read_schedule(f"{kept}.json"),
        n_ctx=context,
        kv=kv,
        flash_attn=True,
        fast_prefill=fast,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    session.load(llm, kept)
    Path("/proc/self/clear_refs").write_text("5")
    llm.eval(llm.input_ids[:BLOCK].tolist())
    return status("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--text", type=Path, default=None, help="default: Python's documentation")
    parser.add_argument("--kv", default="q8_0")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kept, fast = args.child
        print(read_last_block(str(args.model), args.kv, args.context, args.threads, kept, fast == "ours"))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, str(Path(folder) / "session"))


def compare(args: argparse.Namespace, kept: str) -> None:
    import ropewalk
    from models import bundled_model, text
    from ropewalk.container import native_schedule, read_header
    from ropewalk.factors import extend, write_schedule
    from ropewalk.runtime import session

    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    schedule = extend(native, max(args.context, 2 * native.context))
    schedule = schedule.only(schedule.band_index(args.context))
    write_schedule(schedule, f"{kept}.json")
    llm = ropewalk.Llama(model, schedule=schedule, n_ctx=args.context, kv=args.kv, flash_attn=True, verbose=False)
    llm.eval(llm.tokenize(text(args.text).encode())[: args.context - BLOCK])
    session.save(llm, kept)
    llm.close()
    peaks = {}
    for name in ("stock", "ours"):
        options = ["--model", model, "--kv", args.kv, "--context", args.context, "--threads", args.threads]
        command = [sys.executable, __file__, *map(str, options), "--child", kept, name]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:6} {peaks[name] / 2**20:8.1f} MiB", flush=True)
    print(f"ours takes {(peaks['ours'] - peaks['stock']) / 2**20:.1f} MiB more at {args.context:,} tokens of {args.kv}")
    code = "from memory import status; a = status('VmRSS'); import torch; print(status('VmRSS') - a)"
    here = Path(__file__).parent
    torch = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=here).stdout
    print(f"importing torch, in both: {int(torch) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
