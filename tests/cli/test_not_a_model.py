"""GGUF files that are no model that runs: every command says what they are, in one line."""

import gguf
import pytest
from ropewalk.container import read_header
from ropewalk.convert.split import split_model


def vocabulary(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_head_count(2)
    writer.add_block_count(2)
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("files")
    whole = tiny_llama(folder / "whole.gguf")
    parts = split_model(whole, folder / "part.gguf", max(tensor.n_bytes for tensor in read_header(whole).tensors))
    (folder / "text.txt").write_text("One rope. " * 400)
    return {
        "text": folder / "text.txt",
        "adapter": tiny_llama(folder / "adapter.gguf", extend=lambda writer: writer.add_type("adapter")),
        "imatrix": tiny_llama(folder / "imatrix.gguf", extend=lambda writer: writer.add_type("imatrix")),
        "vocabulary": vocabulary(folder / "vocabulary.gguf"),
        "part": parts[1],
    }


MESSAGES = {
    "adapter": "is a LoRA adapter, expected a model",
    "imatrix": "is an importance matrix (imatrix), expected a model",
    "vocabulary": "has a vocabulary and no tensors, expected a whole model",
    "part": "parts of a model, expected the first",
}


@pytest.mark.parametrize("command", ["inspect", "convert", "requantise", "chat", "summarize", "search", "eval"])
@pytest.mark.parametrize("kind", MESSAGES)
def test_what_a_file_is(mistake, files, tmp_path, command, kind):
    file, text = files[kind], files["text"]
    arguments = {
        "inspect": ["inspect", file],
        "convert": ["convert", file, tmp_path / "out.gguf", "--context", "1024"],
        "requantise": ["convert", file, tmp_path / "out.gguf", "--type", "q8_0"],
        "chat": ["chat", file],
        "summarize": ["summarize", text, "-m", file, "-o", tmp_path / "out.jsonl"],
        "search": ["search", file, "--text", text, "-o", tmp_path / "out.json"],
        "eval": ["eval", file, text],
    }[command]
    message = mistake(*arguments, stdin=b"Who is it?")
    assert MESSAGES[kind] in message and str(file) in message
    assert not list(tmp_path.iterdir())
