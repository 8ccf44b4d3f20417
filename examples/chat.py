"""Talk with a model: one question per line, the answer as it is generated; an empty line or Ctrl-D ends it.

    python examples/chat.py MODEL.gguf [--document NOTES.md]

A conversation that outgrows its band moves to the next one, which is reported.
"""

import argparse
import sys
from pathlib import Path

import ropewalk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--document", type=Path, help="a text that the model reads first")
    options = parser.parse_args()

    llm = ropewalk.Llama(options.model, n_ctx=0, kv="auto", flash_attn=True, verbose=False)
    llm.on_band_change = lambda change: print(f"(now in the band of {change.new.context:,} tokens)")
    conversation = ropewalk.Conversation(llm, system="You are a helpful assistant.")
    if options.document:
        n_tokens = conversation.read(options.document.name, options.document.read_text(encoding="utf-8"))
        print(f"({options.document}: {n_tokens:,} tokens)")
    for line in sys.stdin:
        if not line.strip():
            break
        sampling = ropewalk.Sampling(max_tokens=200, temperature=0.2)
        conversation.ask(line.strip(), sampling, on_text=lambda text: print(text, end="", flush=True))
        print("\n")
    llm.close()


if __name__ == "__main__":
    main()
