"""Give a GGUF file a longer context.

    python examples/extend.py MODEL.gguf OUT.gguf 32768

The new bands' factors are YaRN's, multiplied onto those that the model carries already.
"""

import argparse
from contextlib import closing

import ropewalk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("context", type=int, help="tokens")
    options = parser.parse_args()

    with closing(ropewalk.Llama(options.model, vocab_only=True, n_ctx=1, verbose=False)) as model:
        schedule = ropewalk.extend(model.schedule, options.context, method="yarn")
    ropewalk.convert_model(options.model, options.out, schedule=schedule)
    for band in schedule.bands:
        factors = band.rescale_factors
        print(f"up to {band.context:,} tokens: rescale factors {min(factors):.3g} to {max(factors):.3g}")


if __name__ == "__main__":
    main()
