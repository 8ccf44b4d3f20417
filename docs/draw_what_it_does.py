"""Draw docs/what-it-does.png from numbers of docs/commands.md (demo) and docs/benchmarks.md (eval)."""

from pathlib import Path

from matplotlib.figure import Figure

DEMO = {"unmodified": (80.2, "names no key"), "extended": (9.4, "names the key")}  # ropewalk demo
METHODS = {"PI": (216.59, 0), "NTK-aware": (41.50, 2), "YaRN": (40.88, 4), "searched": (38.34, 5)}  # ropewalk eval
GREY, BLUE = "#b0b0b0", "#2a6f97"

figure = Figure(figsize=(9, 3.1), layout="constrained")
without, perplexity, keys = figure.subplots(1, 3, width_ratios=(2, 3, 3))

bars = without.bar(list(DEMO), [value for value, _ in DEMO.values()], color=(GREY, BLUE))
without.bar_label(bars, [f"{value}\n{key}" for value, key in DEMO.values()], fontsize=8)
without.set_title("16,016 tokens, trained for 8,192:\nperplexity past 8,192", fontsize=9)
without.set_yticks([])
without.set_ylim(0, 92)

names, colours = list(METHODS), [GREY] * 3 + [BLUE]
bars = perplexity.bar(names, [value for value, _ in METHODS.values()], color=colours)
perplexity.bar_label(bars, fmt="%.1f", fontsize=8)
perplexity.set_yticks([])
perplexity.set_ylim(0, 252)
perplexity.set_title("32,768 tokens, by method:\nperplexity past 8,192", fontsize=9)

bars = keys.bar(names, [found for _, found in METHODS.values()], color=colours)
keys.bar_label(bars, fmt="%d of 5", fontsize=8)
keys.set_yticks([])
keys.set_ylim(0, 5.8)
keys.set_title("32,768 tokens, by method:\nhidden pass keys named", fontsize=9)

for axes in (without, perplexity, keys):
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8)
figure.savefig(Path(__file__).with_name("what-it-does.png"), dpi=150)
