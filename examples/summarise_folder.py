"""Summarise each text file in a folder.

    python examples/summarise_folder.py MODEL.gguf FOLDER

A text that is longer than the model's last band is split, and the summaries of its parts are summarised together.
"""

import argparse
from pathlib import Path

import ropewalk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()

    llm = ropewalk.Llama(options.model, n_ctx=0, kv="auto", flash_attn=True, verbose=False)
    summarizer = ropewalk.Summarizer(llm)
    for path in sorted(path for path in options.folder.iterdir() if path.suffix in (".txt", ".md")):
        try:
            summary = summarizer.summarize(path.read_text(encoding="utf-8"))
        except (ropewalk.UserError, UnicodeDecodeError) as error:
            print(f"{path}: {error}\n")
            continue
        print(f"{path} ({summary.n_tokens:,} tokens, {summary.parts} parts)\n{summary.text}\n")
    llm.close()


if __name__ == "__main__":
    main()
