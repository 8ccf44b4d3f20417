"""`ropewalk inspect` as a user runs it."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import llama_cpp
import pytest
from ropewalk.cli.picture import draw_factors
from ropewalk.container import native_schedule, read_header
from ropewalk.convert import embed_schedule
from ropewalk.factors import Provenance, Schedule, extend
from ropewalk.runtime import repacking
from ropewalk.runtime.graph.kernels import why_missing
from ropewalk.runtime.threads import default_threads


@pytest.fixture(scope="module")
def run(ropewalk_command):
    return partial(ropewalk_command, "inspect")


@pytest.fixture(scope="module")
def extended(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "long.gguf"
    embed_schedule(smollm2, path, extend(native_schedule(read_header(smollm2)), 32768))
    return path


def test_metadata_bands_memory_and_stock_llama_cpp(run, extended):
    result = run(extended)
    assert result.returncode == 0 and not result.stderr
    for words in (
        "llama, 30 layers",
        "64 dimensions, base 100000",
        "trained for 8,192 tokens, serves 32,768",
        "embedded schedule",
        "16,384",
        "▁",
        "q8_0:f16",
        "Stock llama.cpp",
        "never changes",
    ):
        assert words in result.stdout, words
    assert "\x1b[" not in result.stdout  # piped: no colours


def test_json_has_the_same_facts(run, extended):
    facts = json.loads(run(extended, "--json").stdout)
    assert [band["context"] for band in facts["bands"]] == [8192, 16384, 32768]
    assert facts["model"]["n_rot"] == 64 and facts["schedule"] == "embedded"
    assert {row["context"] for row in facts["memory"]} == {8192, 16384, 32768}
    assert all(row["total_bytes"] > row["cache_bytes"] > 0 for row in facts["memory"])


def test_a_plot_is_saved(run, extended, tmp_path):
    picture = tmp_path / "factors.png"
    result = run(extended, "--plot", picture)
    assert result.returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [picture]
    result = run(extended, "--plot", tmp_path / "no" / "x.png")
    assert result.returncode == 2 and "its folder does not exist" in result.stderr


def test_text_in_a_file_cannot_take_over_the_terminal(run, tiny_llama, tmp_path):
    def rename(writer):
        writer.kv_data[0]["general.name"].value = "[/bold]\x1b[2J"

    path = tiny_llama(tmp_path / "m.gguf", extend=rename)
    result = run(path)
    assert result.returncode == 0 and result.stdout.startswith("[/bold][2J  llama") and "\x1b" not in result.stdout


def test_a_closed_pipe_is_not_an_error(extended):
    command = f"{sys.executable} -m ropewalk inspect --json {extended} | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert result.stdout == "{\n" and not result.stderr


def test_native_factors_are_shown(run, tiny_llama, tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", rope_freqs=[1 + i / 2 for i in range(16)])
    result = run(path)
    assert "1–8.5" in result.stdout and "native schedule" in result.stdout


def test_a_near_window_is_shown(run, tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "m.gguf")
    assert "near:" not in run(source).stdout
    schedule = extend(native_schedule(read_header(source)), 1024, "near", near_tokens=100)
    band = schedule.bands[-1].model_copy(update={"found": Provenance(method="near", losses=(2.5, 2.75))})
    embed_schedule(source, tmp_path / "near.gguf", schedule.model_copy(update={"bands": (*schedule.bands[:-1], band)}))
    result = run(tmp_path / "near.gguf", "--plot", tmp_path / "factors.png")
    row = re.search(r"1,024  \S+ +5.923 +100 .* near", result.stdout)
    assert result.returncode == 0 and row and "near: tokens nearer than this" in result.stdout
    stock = (
        "It has no near window (100 tokens): it reads with plain λ (yarn), at a loss of 2.75 where the window has 2.5."
    )
    assert stock in result.stdout
    facts = json.loads(run(tmp_path / "near.gguf", "--json").stdout)
    assert facts["bands"][2]["near_tokens"] == 100 and facts["bands"][2]["plain"]["found"]["method"] == "yarn"
    assert stock in facts["stock_llama_cpp"]


def test_pairs_that_stand_still_are_counted_and_not_drawn(run, tiny_llama, tmp_path):
    source = tiny_llama(tmp_path / "m.gguf")
    schedule = extend(native_schedule(read_header(source)), 1024, "near", near_tokens=100)
    last = schedule.bands[-1]
    factors = (1e6, 1e6, 1e6, *last.rescale_factors[3:-1], 7.0)
    last = last.model_copy(update={"rescale_factors": factors, "found": Provenance(method="cma")})
    embed_schedule(source, tmp_path / "still.gguf", schedule.model_copy(update={"bands": (*schedule.bands[:-1], last)}))
    shown = run(tmp_path / "still.gguf").stdout
    assert re.search(r"1,024  ···[▁▂▃▄▅▆▇█]+ +5.92–7 +100 .* cma", shown) and "e+06" not in shown
    assert "up to 1,024: the 3 fastest pairs stand still beyond it (·); λ is of the others" in shown
    assert json.loads(run(tmp_path / "still.gguf", "--json").stdout)["bands"][-1]["rescale_factors"][0] == 1e6
    [line] = draw_factors(Schedule(facts=schedule.facts, bands=(last,)), "").axes[0].lines
    assert list(line.get_xdata()) == list(range(3, len(factors))) and list(line.get_ydata()) == list(factors[3:])
    assert "3 pairs stand still" in line.get_label()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_a_file_that_is_not_a_model_is_a_one_line_error(run, tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for name in (path, tmp_path, tmp_path / "missing.gguf"):
        result = run(name)
        assert result.returncode == 2
        assert result.stderr.startswith(f"ropewalk: {name}: ") and result.stderr.count("\n") == 1
        assert not result.stdout


def test_an_architecture_without_rope_is_refused(run, tiny_llama, tmp_path):
    result = run(tiny_llama(tmp_path / "m.gguf", arch="gpt2"))
    assert result.returncode == 2 and "'gpt2' has no RoPE" in result.stderr


def test_help_is_fast_and_loads_no_heavy_modules():
    code = (
        "import sys; sys.argv = ['ropewalk', '--help']\n"
        "from ropewalk.cli.main import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'llama_cpp', 'pydantic', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "summarize" in result.stdout and result.stdout.strip().endswith("[]")


def test_the_machine(run, smollm2, monkeypatch):
    facts = json.loads(run("--machine", "--json").stdout)["machine"]
    assert facts["llama_cpp"] == llama_cpp.__version__
    assert facts["threads"] == default_threads() and facts["cpus"] >= facts["threads"]
    assert facts["computes"] == ("torch" if why_missing() else "kernels")
    shown = run("--machine").stdout
    assert llama_cpp.__version__ in shown and (facts["instructions"] or "not compiled") in shown
    both = json.loads(run(smollm2, "--machine", "--json").stdout)
    assert both["machine"] == facts and both["model"]["layers"] == 30
    assert run(smollm2, "--machine").stdout.endswith(shown)
    monkeypatch.setenv("ROPEWALK_KERNELS", "0")
    assert "none: ROPEWALK_KERNELS is 0" in run("--machine").stdout


@pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")
def test_the_machine_with_other_kernels(run, monkeypatch):
    monkeypatch.setenv("ROPEWALK_INSTRUCTIONS", "plain C")
    monkeypatch.setenv("ROPEWALK_EXACT", "1")
    assert re.search("native kernels +plain C, exact", run("--machine").stdout)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What would be known about the bundled model's weights if llama.cpp repacked them here."""

    def put(**found):
        known = repacking.Comparison("Q4_1", 2, 2, **found)
        monkeypatch.delenv(repacking.SWITCH)
        monkeypatch.setattr(repacking, "_types_repacked_here", lambda: frozenset({"Q4_1"}))
        monkeypatch.setattr(repacking, "_folder", lambda: tmp_path)
        monkeypatch.setattr(repacking, "default_threads", lambda: 2)
        repacking._place(repacking.identity(), "Q4_1", 2, 2).write_text(json.dumps(asdict(known)))

    return put


@pytest.mark.skipif(bool(why_missing()), reason="the kernels were not compiled")
@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ({"reading": 2.2, "writing": 1.1}, "our kernels, at 2.2 × (reading) and 1.1 × (writing) the speed of"),
        ({"reading": 0.5, "writing": 0.8}, "llama.cpp's kernels for repacked weights; ours have 0.5 × (reading)"),
        ({"repacked": False}, "our kernels; llama.cpp does not repack these here"),
        ({"failed": "exit code -11: nothing"}, "llama.cpp's kernels for repacked weights; measuring failed (exit code"),
    ],
)
def test_whose_products_are_faster(run, smollm2, measured, found, shown):
    assert "Products:" not in run(smollm2).stdout
    measured(**found)
    assert f"Products: {shown}" in run(smollm2).stdout
    assert f"q4_1, 2 threads: {shown}" in run("--machine").stdout
    facts = json.loads(run(smollm2, "--machine", "--json").stdout)
    assert facts["products"] == facts["machine"]["repacking"][0] and facts["products"]["kind"] == "Q4_1"


def test_repacking_as_the_environment_says(run, smollm2, measured, monkeypatch):
    measured(reading=2.0)
    monkeypatch.setenv(repacking.SWITCH, "0")
    assert "Products:" not in run(smollm2).stdout
    assert "may not repack any" in run("--machine").stdout


def test_neither_a_file_nor_the_machine(mistake):
    assert mistake("inspect").startswith("ropewalk: inspect: expected a FILE, or --machine")
