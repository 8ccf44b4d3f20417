"""What the commands that people wait for do not import."""

import subprocess
import sys

import pytest
from ropewalk.runtime.graph.kernels import why_missing

SLOW = ("torch", "transformers", "gguf", "matplotlib", "prompt_toolkit", "huggingface_hub", "pygments", "sentencepiece")

RUN = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {SLOW} if name in sys.modules], file=sys.stderr))
from ropewalk.cli.main import main
main()
"""


@pytest.mark.skipif(bool(why_missing()), reason="torch computes where the kernels were not compiled")
@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "{model}", "--max-tokens", "2"),
        ("summarize", "{text}", "--model", "{model}", "-o", "{out}", "--max-tokens", "16"),
        ("inspect", "{model}", "--machine"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_slow_is_imported(tiny_llama, tmp_path, arguments):
    text = tmp_path / "text.txt"
    text.write_text("the train in a tree")
    places = {"model": tiny_llama(tmp_path / "m.gguf"), "text": text, "out": tmp_path / "out.jsonl"}
    words = [word.format(**places) for word in arguments]
    done = subprocess.run([sys.executable, "-c", RUN, *words], input="the sea\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
