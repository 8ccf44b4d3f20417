"""How many evaluations each search algorithm needs, compared with LongRoPE's evolution at its full budget.

    python benchmarks/search_algorithms.py --text FILE... [--model FILE.gguf] [--context 10240] [--window 256]
                                           [--folder search-algorithms] [--algorithms cma,gradient] [--share 0.1]
                                           [--evaluator torch] [--workers 2]

A real model and a short extension. Evaluations are cheap, so that 1,344 of them (64 + 40 x 32, arXiv 2402.13753,
appendix A) take about an hour: each scores the last `window` tokens of one passage of each text, with a cache that is
read once and whose keys are rotated for each candidate. All algorithms minimise the same loss, from the same start.
The others get `share` of the evaluations, of which a gradient counts four; gradients need torch. The minutes of the
first include the workers' reading of the texts, some five; the others find it done. If killed, it resumes where it was:
evaluations are kept in `folder`, and the curves are drawn to `folder`/curves.png.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import ropewalk
from models import bundled_model
from ropewalk.container import native_schedule, read_header
from ropewalk.factors.search import (
    Budget,
    Engine,
    Evaluator,
    Outcome,
    Processes,
    Progress,
    Result,
    Settings,
    Space,
    Task,
    search,
)
from ropewalk.runtime.measure.evaluators import make_evaluator
from ropewalk.runtime.measure.evaluators.spec import EvaluatorSpec
from ropewalk.runtime.measure.passages import Text, make_passages

PAPER = 64 + 40 * 32
BEFORE = 4  # the start and three closed forms are evaluated before an algorithm starts


class Windowed:
    """An evaluator that reads only the window, at any fidelity."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator, self.key, self.weights = evaluator, f"window {evaluator.key}", evaluator.weights

    def evaluate(self, task: Task) -> Result:
        return self.evaluator.evaluate(replace(task, fidelity="screen"))


@dataclass(frozen=True)
class Recipe:
    """Creates a `Windowed`, in any process."""

    spec: EvaluatorSpec

    def __call__(self) -> Windowed:
        return Windowed(make_evaluator(self.spec))


def run(engine: Engine, space: Space, algorithm: str, evaluations: float, folder: Path) -> Outcome:
    def tell(event: object) -> None:
        if isinstance(event, Progress):
            print(f"\r{algorithm} {event.step:24}{event.evaluations:8,.0f}{event.best:10.5f}", end="", flush=True)

    settings = Settings(algorithm=algorithm, budget=Budget(evaluations=evaluations), finalists=1)
    outcome = search(engine, space, settings, folder / f"{algorithm}.journal", on_event=tell)
    print()
    return outcome


def report(outcomes: dict[str, Outcome], folder: Path) -> None:
    paper = outcomes["evolution"]
    print(f"YaRN {paper.yarn:.5f} nats per token")
    for name, outcome in outcomes.items():
        reached = next((spent for spent, loss in outcome.history if loss <= paper.loss), None)
        when = "never" if reached is None else f"after {reached:,.0f}, {reached / PAPER:.3f} of the full budget"
        minutes = outcome.seconds / 60
        print(f"{name:10} best {outcome.loss:.5f}, {outcome.evaluations:,.0f} evaluations, {minutes:.1f} min;", end=" ")
        print(f"as good as evolution's best: {when}")
        print("    " + "  ".join(f"{spent:,.0f}: {loss:.5f}" for spent, loss in outcome.history))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, outcome in outcomes.items():
        curve = [*outcome.history, (outcome.evaluations, outcome.loss)]
        axes.step(*zip(*curve, strict=True), where="post", marker=".", label=name)
    axes.axhline(paper.yarn, linestyle="--", linewidth=1, color="grey", label="yarn")
    axes.set_xscale("log")
    axes.set_xlabel("evaluations")
    axes.set_ylabel("lowest loss so far (nats/token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--context", type=int, default=10240)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("search-algorithms"))
    parser.add_argument("--algorithms", default="cma,gradient")
    parser.add_argument("--evaluator", choices=("llama", "torch"), default="torch")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = args.model or bundled_model()
    native = native_schedule(read_header(model))
    vocab = ropewalk.Llama(model, n_ctx=1, vocab_only=True, verbose=False)
    texts = [Text(path.name, path.read_text(encoding="utf-8")) for path in args.text]
    passages = make_passages(vocab, texts, args.context, len(texts), "tail", native.context, 0)
    space = Space(native.facts, native.bands[-1], args.context)
    base = space.band(space.seed("yarn"))
    spec = EvaluatorSpec(str(model), passages, base, window=args.window, threads=1, kind=args.evaluator)
    engine = Processes(Recipe(spec), args.workers)
    outcomes = {}
    for algorithm in args.algorithms.split(","):
        outcomes[algorithm] = run(engine, space, algorithm, BEFORE + args.share * PAPER, args.folder)
    outcomes["evolution"] = run(engine, space, "evolution", BEFORE + PAPER, args.folder)
    report(outcomes, args.folder)
    engine.close()


if __name__ == "__main__":
    main()
