"""What a suite found, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .terminal import out, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from ..runtime.measure.suites import Estimate, Report, Row, Run, Setting

SHADES = " ░▒▓█"
"""For a right answer's likelihood, from 0 to 1."""

COLOURS = ("#67000d", "#d7301f", "#fc8d59", "#c9c95c", "#41ab5d")
"""The same on a terminal with colours."""


def show(report: Report, setting: Setting, run: Run) -> None:
    """Print everything: by length, by task, by depth, effective lengths, short texts and cache types."""
    _show_settings(report, setting, run)
    print_table(_by_length(report, run))
    for length in report.lengths:
        out.print(f"\n[bold]{length:,} tokens[/] by task: accuracy, and loss in nats per token")
        print_table(_by_task(report, run, length))
    _show_depths(report)
    _show_effective(report)
    _show_short(report)
    _show_caches(report)


def _show_settings(report: Report, setting: Setting, run: Run) -> None:
    plan = run.plan
    way = "through the chat template" if setting.chat else "as plain text, without a chat template"
    out.print(
        f"{len(plan.tasks)} tasks, {plan.samples} questions each, up to {plan.share} of them about one text; prompts go"
        f" {way}; cache {setting.kv_type}; trained for {report.original:,} tokens\n",
        soft_wrap=True,
    )


def _table(*names: str, left: tuple[str, ...] = ("method", "task")) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def _by_length(report: Report, run: Run) -> Table:
    table = _table("length", "method", "accuracy", "95 %", "loss", "95 %", "against YaRN", "95 %")
    for length in report.lengths:
        for i, (names, row) in enumerate(_distinct(report, run, length)):
            against = row.against_yarn if not {"none", "yarn"} <= set(names) else None
            table.add_row(
                f"{length:,}" if not i else "",
                ", ".join(names),
                f"{row.accuracy.mean:.0%}",
                f"{row.accuracy.low:.0%} to {row.accuracy.high:.0%}",
                f"{row.loss.mean:.2f}",
                _range(row.loss),
                f"{against.mean:+.2f}" if against else "",
                _range(against, "+") if against else "",
            )
    return table


def _distinct(report: Report, run: Run, length: int) -> list[tuple[list[str], Row]]:
    """The rows of a length, one for all methods that read it in the same band, with their names."""
    from ..runtime.measure.suites import band_key

    rows = {row.method: row for row in report.rows if row.length == length}
    groups: dict[str, list[str]] = {}
    for method, band in run.plan.bands[length].items():
        groups.setdefault(band_key(band), []).append(method)
    return [(names, rows[names[0]]) for names in groups.values()]


def _range(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.low:{sign}.2f} to {estimate.high:{sign}.2f}"


def _by_task(report: Report, run: Run, length: int) -> Table:
    groups = [names for names, _ in _distinct(report, run, length)]
    table = _table("task", *(", ".join(names) for names in groups), left=("task",))
    cells = {(cell.task, cell.method): cell for cell in report.cells() if cell.length == length}
    for task in report.tasks:
        found = [cells[task, names[0]] for names in groups]
        table.add_row(task, *(f"{cell.accuracy.mean:4.0%} {cell.loss.mean:5.2f}" for cell in found))
    return table


def _show_depths(report: Report) -> None:
    method = "schedule" if "schedule" in report.methods else report.methods[-1]
    parts = report.depths(method)
    if not parts:
        return
    out.print(
        f"\n[bold]Where the answer stands[/] ({method}): accuracy; the fuller the block, the likelier the right answer"
    )
    table = _table("depth", *(f"{length:,}" for length in report.lengths))
    for low, high in sorted({(part.low, part.high) for part in parts}):
        found = {part.length: part for part in parts if part.low == low}
        cells = (found.get(length) for length in report.lengths)
        table.add_row(
            f"{low:.0%}–{high:.0%}", *(f"{_block(part.loss)} {part.accuracy:4.0%}" if part else "" for part in cells)
        )
    print_table(table)


def _block(loss: float) -> str:
    from ..runtime.measure.suites.scoring import likelihood

    level = min(int(likelihood(loss) * len(SHADES)), len(SHADES) - 1)
    return f"[{COLOURS[level]}]{'█' * 4}[/]" if out.color_system and not out.no_color else SHADES[level] * 4


def _show_effective(report: Report) -> None:
    from ..runtime.measure.suites import KEPT

    found = report.effective()
    if not found:
        return
    where = f"{report.own_length:,} tokens" if report.own_length else ""
    out.print(
        f"\n[bold]Effective length[/]: up to where a method keeps {KEPT:.0%} of what the model itself has at {where}"
    )
    table = _table("method", "by accuracy", "by likelihood")
    for effective in found:
        lengths = (effective.by_accuracy, effective.by_likelihood)
        table.add_row(effective.method, *("none" if length is None else f"{length:,}" for length in lengths))
    print_table(table)


def _show_short(report: Report) -> None:
    if not report.short:
        return
    out.print(
        f"\n[bold]Short texts[/] in the bands for {report.short[0].context:,} tokens: loss against the model's own band"
    )
    table = _table("method", "nats per token", "95 %")
    for short in report.short:
        estimate = short.difference
        table.add_row(short.method, f"{estimate.mean:+.4f}", f"{estimate.low:+.4f} to {estimate.high:+.4f}")
    print_table(table)


def _show_caches(report: Report) -> None:
    if not report.caches:
        return
    out.print("\n[bold]Cache types[/] against f16: Kullback–Leibler divergence, nats per token")
    table = _table("cache", "mean", "99th percentile", "same first choice", left=("cache",))
    for cache in report.caches:
        table.add_row(cache.kv_type, f"{cache.mean:.5f}", f"{cache.p99:.4f}", f"{cache.same:.1%}")
    print_table(table)
