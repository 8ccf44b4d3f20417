"""Search the rescale factors of one more band, for twice the context that a model holds.

    python examples/search.py MODEL.gguf S.json TEXT...

Each text must be longer than the new context, and there should be three or more: a third of them judges the result. A
hundred candidates are evaluated, which takes hours on a CPU where the context is long; they are kept in a folder beside
S.json, from which an interrupted search is resumed.
"""

import argparse
import math
from contextlib import closing
from pathlib import Path

import ropewalk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    options = parser.parse_args()

    with closing(ropewalk.Llama(options.model, vocab_only=True, n_ctx=1, verbose=False)) as model:
        context = 2 * model.schedule.context
    texts = tuple(ropewalk.Text(path.name, path.read_text(encoding="utf-8")) for path in options.texts)
    folder = Path(f"{options.output}.search")
    plan = ropewalk.SearchPlan(model=options.model, texts=texts, contexts=(context,), folder=folder)
    schedule, (found,) = ropewalk.search_schedule(plan)
    ropewalk.write_schedule(schedule, options.output)
    print(f"{options.output}: up to {context:,} tokens, found in {found.outcome.evaluations:.0f} evaluations")
    print(f"held-out perplexity against YaRN's: {math.expm1(found.verdict.difference):+.2%}")


if __name__ == "__main__":
    main()
