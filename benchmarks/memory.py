"""Peak memory of reading the last tokens of a full context: ours and stock llama-cpp-python, in one process each.

    python benchmarks/memory.py [--model FILE.gguf] [--text FILE] [--kv q8_0] [--context 32768] [--threads 2]

The context is read once and its cache saved to a file; each process loads it, and its peak is measured from then on
while it reads the last 512 tokens. Both import torch, whose cost is printed separately, since stock alone would not
need it. Linux only (the peak is reset in /proc).
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


def read_last_block(model: str, kv: str, context: int, threads: int, session_path: str, fast: bool) -> int:
    """Peak bytes while reading the last block of `context` tokens, after loading a session file without them."""
    import ropewalk
    import torch  # noqa: F401
    from ropewalk.factors import read_schedule
    from ropewalk.runtime import session

    llm = ropewalk.Llama(
        model,
        schedule=read_schedule(f"{session_path}.json"),
        n_ctx=context,
        kv=kv,
        flash_attn=True,
        fast_prefill=fast,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    session.load(llm, session_path)
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
        session_path, name = args.child
        print(read_last_block(str(args.model), args.kv, args.context, args.threads, session_path, name == "ours"))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, str(Path(folder) / "session"))


def compare(args: argparse.Namespace, session_path: str) -> None:
    import ropewalk
    from models import bundled_model, text
    from ropewalk.container import native_schedule, read_header
    from ropewalk.factors import extend, write_schedule
    from ropewalk.runtime import session

    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    schedule = extend(native, max(args.context, 2 * native.context))
    schedule = schedule.only(schedule.band_index(args.context))
    write_schedule(schedule, f"{session_path}.json")
    llm = ropewalk.Llama(model, schedule=schedule, n_ctx=args.context, kv=args.kv, flash_attn=True, verbose=False)
    llm.eval(llm.tokenize(text(args.text).encode())[: args.context - BLOCK])
    session.save(llm, session_path)
    llm.close()
    peaks = {}
    for name in ("stock", "ours"):
        options = ["--model", model, "--kv", args.kv, "--context", args.context, "--threads", args.threads]
        command = [sys.executable, __file__, *map(str, options), "--child", session_path, name]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:6} {peaks[name] / 2**20:8.1f} MiB", flush=True)
    print(f"ours takes {(peaks['ours'] - peaks['stock']) / 2**20:.1f} MiB more at {args.context:,} tokens of {args.kv}")
    code = "from memory import status; a = status('VmRSS'); import torch; print(status('VmRSS') - a)"
    here = Path(__file__).parent
    torch = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=here).stdout
    print(f"importing torch, in both: {int(torch) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
