"""A process that loads odd files for a fuzzer: llama.cpp aborts, where it does, here.

Run with what to load, "model" or "sequence"; then each line of standard input is the path of one. The answer is a line
of JSON: how it ended, and the error's text.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ropewalk import Llama
from ropewalk.errors import UserError
from ropewalk.runtime import session
from ropewalk.runtime.prompt_cache import PromptCache, PromptFolder

TEXT = "the rope, 1 walk\n <s> é 你"


def run_model(path: Path) -> None:
    llm = Llama(path, n_ctx=64, kv="auto", n_threads=1, verbose=False)
    try:
        tokens = llm.tokenize(TEXT.encode(), special=True)[:48]
        llm.detokenize(tokens)
        llm.eval(tokens or [0])
        llm.sample()
        if llm.can_rewind:
            llm.rewind(1)
        llm.eval([0, 1])
    finally:
        llm.close()


def sequence_loader(model: Path) -> Callable[[Path], None]:
    """Return what loads a saved sequence, from its own file and from a folder of prompts, and goes on from it."""
    llm = Llama(model, n_ctx=1024, n_threads=1, verbose=False)
    tokens = llm.tokenize(b"the rope " * 200)[:700]

    def run(path: Path) -> None:
        llm.reset()
        if path.is_dir():
            PromptCache(llm, PromptFolder(path, 1 << 30)).read(tokens)
            assert llm.tokens.tolist() == tokens
        else:
            session.load(llm, path)
            assert llm.n_tokens < llm.n_ctx()
        llm.eval([5])
        assert np.isfinite(llm._logits(1)).all()

    return run


def main() -> None:
    kind, *more = sys.argv[1:]
    run = run_model if kind == "model" else sequence_loader(Path(more[0]))
    for line in sys.stdin:
        try:
            run(Path(json.loads(line)))
            answer = ("ran", "")
        except UserError as error:
            answer = ("refused", str(error))
        except BaseException:
            answer = ("failed", traceback.format_exc())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
