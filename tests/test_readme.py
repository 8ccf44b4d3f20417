"""Every example in README.md, docs/ and examples/ is run, and does what is printed there."""

import json
import os
import pydoc_data.topics
import re
import shlex
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
import typer
from ropewalk.cli.main import app
from ropewalk.container import embedded_schedule, read_header
from ropewalk.factors import read_schedule
from safetensors.torch import save_file
from tiny_tokenisers import write_bpe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
LINKING = (*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "THIRD-PARTY-NOTICES.md")))
NOT_HERE = ("make ", "pip ", "ropewalk demo")  # set-up, and what takes minutes

COMMANDS = {
    "README.md": ["convert", "inspect", "chat", "summarize"],
    "commands.md": ["convert", "convert", "chat", "inspect", "chat", "summarize"],
    "file-format.md": ["convert"],
}
SCRIPTS = {"README.md": 1, "commands.md": 2, "file-format.md": 3}
EXAMPLES = ("chat.py", "extend.py", "search.py", "summarise_folder.py")


class Example(NamedTuple):
    """A command, a Python script, or a file, with what is printed (a file: with its name)."""

    kind: str
    text: str
    printed: str


def examples(page):
    """The examples of a page in order.

    Each `$ …` line of a console block is a command, printed is what follows it. A Python block's output is the text
    block right after it. A JSON block right after "`NAME`:" is that file.
    """
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE))
    for fence, after in zip_longest(fences, fences[1:]):
        kind, text = fence.groups()
        if kind == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                if not command.startswith(NOT_HERE):
                    yield Example("command", command, output.strip())
        elif kind == "python":
            follows = after and after[1] == "text" and not page[fence.end() : after.start()].strip()
            yield Example("script", text, after[2] if follows else "")
        elif kind == "json" and (name := re.search(r"`([\w.-]+)`:\n\n$", page[: fence.start()])):
            yield Example("file", text, name[1])


def run(command, folder, stdin=""):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env={**os.environ, "PATH": path},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


def command_name(command):
    return command.split("ropewalk ")[1].split()[0]


@pytest.fixture
def folder(smollm2, tiny_llama, tmp_path):
    """Where an example runs: with the files that the pages name."""
    (tmp_path / "model.gguf").symlink_to(smollm2)
    tiny_llama(tmp_path / "tiny.gguf", context_length=256, n_layer=1, n_embd=16)
    (tmp_path / "notes.md").write_text(pydoc_data.topics.topics["assert"], encoding="utf-8")
    return tmp_path


HUGGING_FACE = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def checkpoint(smollm2, tmp_path_factory):
    """The bundled model as a Hugging Face checkpoint."""
    place = tmp_path_factory.mktemp("checkpoint")
    reader = gguf.GGUFReader(smollm2)
    heads = {"attn_q": 9, "attn_k": 3}
    weights = {}
    for tensor in reader.tensors:
        numbers = np.array(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(tensor.shape[::-1])
        *layer, name, _ = tensor.name.removeprefix("blk.").split(".")
        if name in heads:  # back from pairs of neighbours to halves
            pairs = numbers.reshape(heads[name], -1, 2, numbers.shape[1])
            numbers = pairs.swapaxes(1, 2).reshape(numbers.shape)
        at = f"model.layers.{layer[0]}." if layer else "model."
        weights[f"{at}{HUGGING_FACE[name]}.weight"] = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16()
    save_file(weights, place / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    (place / "config.json").write_text(json.dumps(config))
    write_bpe(place)
    return place


def shape(text):
    """The text without what differs from machine to machine: numbers, and the spaces around them."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.,]+", "#", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples(page, folder, request):
    found = list(examples(page.read_text(encoding="utf-8")))
    commands = [command_name(example.text) for example in found if example.kind == "command"]
    assert commands == COMMANDS.get(page.name, [])
    assert sum(example.kind == "script" for example in found) == SCRIPTS.get(page.name, 0)
    if any("checkpoint/" in example.text for example in found):
        (folder / "checkpoint").symlink_to(request.getfixturevalue("checkpoint"))
    for kind, text, printed in found:
        if kind == "file":
            (folder / printed).write_text(text, encoding="utf-8")
        elif kind == "script":
            check_script(text, printed, folder)
        else:
            check_command(text, printed, folder)


def check_script(code, printed, folder):
    (folder / "example.py").write_text(code, encoding="utf-8")
    result = run(f"{sys.executable} example.py", folder)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    if printed:
        assert result.stdout == printed


def check_command(command, printed, folder):
    result = run(command, folder)
    assert result.returncode == 0, result.stderr
    name = command_name(command)
    if name in ("convert", "inspect"):
        assert result.stdout.strip() and not result.stderr
        if printed:
            assert shape(result.stdout.strip()) == shape(printed)
    elif name == "chat":
        assert len(result.stdout.strip()) > 10 and not result.stderr
    else:
        written = json.loads((folder / "summaries.jsonl").read_text(encoding="utf-8"))
        assert len(written["summary"]) > 20


def test_all_that_convert_and_inspect_print_is_shown_somewhere():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    shown = [example for example in examples(page) if example.kind == "command"]
    assert all(example.printed for example in shown if command_name(example.text) in ("convert", "inspect"))


def test_the_schedule_that_is_shown_is_the_one_embedded(folder):
    page = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")
    found = {example.kind: example for example in examples(page)}
    (folder / found["file"].printed).write_text(found["file"].text, encoding="utf-8")
    assert run(found["command"].text, folder).returncode == 0
    shown = read_schedule(folder / found["file"].printed)
    assert embedded_schedule(read_header(folder / "tiny-512.gguf")) == shown
    assert shown.model_dump(mode="json") == json.loads(found["file"].text)  # no field is left out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_take_long_are_at_least_understood(page):
    commands = typer.main.get_command(app).commands
    shown = re.findall(r"^ropewalk (\w+) (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if page.name in ("README.md", "commands.md"):
        assert {"search", "eval"} <= {name for name, _ in shown}
    for name, arguments in shown:
        assert commands[name].make_context(name, shlex.split(arguments)).params, name


def test_every_script_in_examples_is_run():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


def example(name, *arguments, folder, stdin=""):
    result = run([sys.executable, ROOT / "examples" / name, *map(str, arguments)], folder, stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_example_that_extends(folder):
    assert "1,024" in example("extend.py", "tiny.gguf", "long.gguf", 1024, folder=folder)
    assert embedded_schedule(read_header(folder / "long.gguf")).context == 1024


def test_the_example_that_searches(folder):
    texts = "\n\n".join(pydoc_data.topics.topics.values())
    for i in range(3):
        (folder / f"{i}.txt").write_text(texts[i * 50_000 :][:8_000], encoding="utf-8")
    assert "512" in example("search.py", "tiny.gguf", "S.json", "0.txt", "1.txt", "2.txt", folder=folder)
    assert [band.context for band in read_schedule(folder / "S.json").bands] == [256, 512]


def test_the_example_that_chats(folder):
    said = example("chat.py", "model.gguf", folder=folder, stdin="Name one colour.\nAnd another one?\n")
    assert len(said.split()) > 4


def test_the_example_that_summarises(folder):
    summaries = example("summarise_folder.py", "model.gguf", ".", folder=folder)
    assert "notes.md" in summaries and len(summaries) > 40


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_what_it_points_at_is_there(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in map(anchor, headings), target


def anchor(heading):
    """A heading's name in links, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
