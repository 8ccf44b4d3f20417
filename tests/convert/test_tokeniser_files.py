"""Tokenisers in the forms that people have them: one file of several, leftovers, lists of EOS tokens, odd ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import tiny_checkpoints as checkpoints
import varied_text as varied
from gguf import TokenType
from ropewalk.container import read_header
from ropewalk.convert import convert_checkpoint
from ropewalk.errors import UserError
from test_tokeniser import differing_lines, encoder, llama_tokens
from tiny_checkpoints import BPE, GEMMA2, GEMMA3, LLAMA, MINICPM, PHI3, PHI3_TOKENS, QWEN2, V1
from tokenizers import Tokenizer

SMALL = {**LLAMA, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 49152}
CONTROL, USER_DEFINED, NORMAL = (int(kind) for kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL))


def written(folder: Path, config: dict[str, Any], tokeniser: Any = V1, **more: Any) -> Path:
    case = checkpoints.Case("model", config, tokeniser, **more)
    if not case.can_be_made():
        pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
    return checkpoints.write_checkpoint(case, folder)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def types_of(file: Path) -> list[int]:
    return read_header(file).array("tokenizer.ggml.token_type")


def ends(file: Path, tokens: range) -> list[int]:
    """Those of some tokens at which llama.cpp ends a generation."""
    llm = llama_cpp.Llama(str(file), vocab_only=True, n_ctx=1, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    found = [token for token in tokens if llama_cpp.llama_vocab_is_eog(vocab, token)]
    llm.close()
    return found


# --- tokenizer.json alone

SAVED_BY_TRANSFORMERS_5 = {
    "gemma2": (GEMMA2, "GemmaTokenizer", ("<start_of_turn>", "[END]")),
    "gemma3": ({**GEMMA3, "num_hidden_layers": 1}, "GemmaTokenizer", ("<start_of_turn>", "[END]")),
    "phi3": (PHI3, None, PHI3_TOKENS),
    "minicpm": (MINICPM, "LlamaTokenizer", ("<|im_start|>", "[END]")),
    "llama": (LLAMA, "LlamaTokenizer", ("<|im_start|>", "[END]")),
    "qwen2": (QWEN2, None, ("<|im_start|>", "[END]")),
}


@pytest.mark.parametrize("name", SAVED_BY_TRANSFORMERS_5)
def test_what_transformers_5_saves(name: str, tmp_path: Path) -> None:
    """It writes tokenizer.json alone, with the added tokens in it, and `TokenizersBackend` for many classes."""
    import transformers

    config, class_name, added = SAVED_BY_TRANSFORMERS_5[name]
    config = {**config, "vocab_size": 544}
    folder = written(tmp_path, config, tokeniser_files="json", added=added)
    loader = getattr(transformers, class_name or "PreTrainedTokenizerFast")
    tokeniser = loader.from_pretrained(folder)
    for file in (*folder.glob("*token*"), *folder.glob("*.jinja")):
        file.unlink()
    tokeniser.save_pretrained(folder)
    assert sorted(path.name for path in folder.glob("*token*")) == ["tokenizer.json", "tokenizer_config.json"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == (class_name or "TokenizersBackend")

    file = tmp_path / "out.gguf"
    convert_checkpoint(folder, file)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    differing = differing_lines(file, varied.varied_lines(1000), encoder(original))
    # llama.cpp cannot leave out the space before a text that starts with one, as LlamaTokenizer does.
    assert not differing if class_name != "LlamaTokenizer" else all(line.startswith((" ", "▁")) for line in differing)
    texts = [token if class_name == "LlamaTokenizer" else f"{token} Hello{token}" for token in added]
    assert llama_tokens(file, texts, special=True) == encoder(original)(texts)
    for token in added:
        (i,) = original.encode(token, add_special_tokens=False).ids
        assert types_of(file)[i] == (CONTROL if token.startswith("<") else USER_DEFINED)
    assert read_header(file).get("tokenizer.chat_template")


def test_special_tokens_of_a_vocabulary_itself(tmp_path: Path) -> None:
    """Gemma's are in its vocabulary, and listed among the added ones as special or not."""
    folder = written(tmp_path, GEMMA2, tokeniser_files="json")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    texts = sorted(vocabulary, key=vocabulary.get)[300:303]

    def change(data: dict[str, Any]) -> None:
        entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        data["added_tokens"] += [
            {"id": 300, "content": texts[0], **entry, "special": True},
            {"id": 301, "content": texts[1], **entry, "special": False},
        ]

    edit(folder / "tokenizer.json", change)
    convert_checkpoint(folder, tmp_path / "out.gguf")
    usual = NORMAL if "▁" in texts[1] else USER_DEFINED
    assert types_of(tmp_path / "out.gguf")[300:303] == [CONTROL, usual, NORMAL]


def test_added_tokens_beyond_the_models_rows_are_left_out(tmp_path: Path) -> None:
    """As a padding token that was added for training often is."""
    for place, config, tokeniser in ((tmp_path / "a", LLAMA, V1), (tmp_path / "b", SMALL, BPE)):
        place.mkdir()
        folder = written(place, config, tokeniser, tokeniser_files="json", added=("<|pad|>",))
        (note,) = convert_checkpoint(folder, place / "out.gguf")
        assert note == "tokeniser: 1 added tokens beyond vocab_size are left out, e.g. '<|pad|>'"
        assert len(types_of(place / "out.gguf")) == config["vocab_size"]


# --- several files


def test_added_tokens_that_only_tokenizer_json_knows(tmp_path: Path) -> None:
    folder = written(
        tmp_path, {**LLAMA, "vocab_size": 515}, tokeniser_files="both", added=("<|im_start|>", "<|im_end|>", "[END]")
    )
    edit(folder / "tokenizer_config.json", lambda data: data.pop("added_tokens_decoder"))
    (folder / "added_tokens.json").unlink()
    file = tmp_path / "out.gguf"
    assert convert_checkpoint(folder, file) == ()
    texts = ["<|im_start|>user\nHello[END]<|im_end|>"]
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert llama_tokens(file, texts, special=True) == encoder(original)(texts)
    assert types_of(file)[:3] == [int(TokenType.UNKNOWN), CONTROL, CONTROL]
    assert types_of(file)[512:] == [CONTROL, CONTROL, USER_DEFINED]


@pytest.mark.parametrize(
    ("content", "tokeniser"),
    [(b"", V1), (b"version https://git-lfs.github.com/spec/v1\n", V1), (b"IQ== 0\nIg== 1\n", BPE)],
)
def test_an_unusable_model_beside_a_good_json(content: bytes, tokeniser: Any, tmp_path: Path) -> None:
    """An empty file, one that Git LFS did not fetch, and Llama 3's own format, which has the same name."""
    folder = written(tmp_path, SMALL if tokeniser == BPE else LLAMA, tokeniser, tokeniser_files="json")
    convert_checkpoint(folder, tmp_path / "alone.gguf")
    (folder / "tokenizer.model").write_bytes(content)
    (note,) = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert note == f"{folder / 'tokenizer.model'}: not a SentencePiece model; tokenizer.json is used"
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_a_model_of_other_tokens_beside_a_json(tmp_path: Path) -> None:
    """transformers reads tokenizer.json; a tokenizer.model that was left from another model is not used."""
    folder = written(tmp_path, SMALL, BPE)
    convert_checkpoint(folder, tmp_path / "alone.gguf")
    (tmp_path / "other").mkdir()
    shutil.copy(written(tmp_path / "other", LLAMA) / "tokenizer.model", folder)
    (note,) = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert "of 512 tokens are not those of tokenizer.json; tokenizer.json is used" in note
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


BROKEN_JSON: dict[str, Any] = {
    "torn": "{",
    "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\n",
    "of another kind": {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
    "without a vocabulary": {"model": {"type": "BPE"}},
    "with invalid added tokens": {"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [3]},
}


@pytest.mark.parametrize("what", BROKEN_JSON)
def test_an_unusable_json_beside_a_good_model(what: str, tmp_path: Path) -> None:
    folder = written(tmp_path, LLAMA)
    convert_checkpoint(folder, tmp_path / "alone.gguf")
    content = BROKEN_JSON[what]
    (folder / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (note,) = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert note.startswith(f"{folder / 'tokenizer.json'}: ") and note.endswith("; tokenizer.model is used")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_added_tokens_of_a_json_of_another_kind(tmp_path: Path) -> None:
    """T5's and ALBERT's are Unigram, which llama.cpp does not read from tokenizer.json."""
    folder = written(tmp_path, {**LLAMA, "vocab_size": 513}, tokeniser_files="both", added=("<|im_start|>",))
    edit(folder / "tokenizer_config.json", lambda data: data.pop("added_tokens_decoder"))
    (folder / "added_tokens.json").unlink()
    edit(folder / "tokenizer.json", lambda data: data.update(model={"type": "Unigram", "vocab": [["<unk>", 0.0]]}))
    (note,) = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert "'Unigram'" in note and note.endswith("tokenizer.model is used")
    assert llama_tokens(tmp_path / "out.gguf", ["<|im_start|>"], special=True) == [[512]]


def test_both_unusable(tmp_path: Path) -> None:
    folder = written(tmp_path, LLAMA, tokeniser_files="both")
    (folder / "tokenizer.model").write_bytes(b"no model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model$"):
        convert_checkpoint(folder, tmp_path / "out.gguf")


# --- special tokens


IDS = [("model", name, -1) for name in ("pad", "unk", "sep", "eos", "mask")]
IDS += [("json", "pad", -1), ("both", "pad", -1), ("model", "pad", 512), ("model", "eos", 10**30)]


@pytest.mark.parametrize(("tokeniser", "name", "token"), IDS)
def test_an_id_that_no_token_has_is_noted(tokeniser: str, name: str, token: int, tmp_path: Path) -> None:
    folder = written(tmp_path, {**LLAMA, f"{name}_token_id": token}, tokeniser_files=tokeniser)
    assert convert_checkpoint(folder, tmp_path / "out.gguf") == (
        f"{name}_token_id {token}: not one of the 512 tokens, and ignored",
    )


@pytest.mark.parametrize("tokeniser_files", ["model", "json", "both", "bytes"])
def test_every_special_token_that_transformers_has(tokeniser_files: str, tmp_path: Path) -> None:
    if tokeniser_files == "bytes":
        folder = written(tmp_path, {**SMALL, "cls_token_id": 1}, BPE)
    else:
        folder = written(tmp_path, {**LLAMA, "cls_token_id": 1}, tokeniser_files=tokeniser_files)
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    edit(folder / "tokenizer_config.json", lambda data: data.update({f"{name}_token": "<s>" for name in names}))
    convert_checkpoint(folder, tmp_path / "out.gguf")


def test_all_eos_tokens_end_a_generation(tmp_path: Path) -> None:
    added = ("[STOP]", "[HALT]", "[END]")
    for n, (config, generation) in enumerate(
        [
            ({"eos_token_id": [2, 512, 513]}, None),
            ({"eos_token_id": 2}, {"eos_token_id": [2, 512, 513]}),
            ({"eos_token_id": [2, 512]}, {"eos_token_id": 513}),
            ({"eos_token_id": [513, 2, 512], "pad_token_id": 513}, {"eos_token_id": None}),
        ]
    ):
        (tmp_path / str(n)).mkdir()
        files = {"generation_config.json": generation} if generation else {}
        folder = written(tmp_path / str(n), {**LLAMA, "vocab_size": 544, **config}, added=added, files=files)
        assert convert_checkpoint(folder, tmp_path / f"{n}.gguf") == ()
        assert ends(tmp_path / f"{n}.gguf", range(544)) == [2, 512, 513]


def test_all_eos_tokens_of_byte_level_bpe(tmp_path: Path) -> None:
    config = {**SMALL, "vocab_size": 49184, "eos_token_id": [2, 49153]}
    convert_checkpoint(written(tmp_path, config, BPE, added=("<|x|>", "[STOP]")), tmp_path / "out.gguf")
    assert [token for token in ends(tmp_path / "out.gguf", range(49184)) if token in (1, 2, 49152, 49153)] == [2, 49153]


def test_eos_tokens_of_a_sentencepiece_model(tmp_path: Path) -> None:
    """Its first becomes EOS, for which llama.cpp would otherwise take token 2."""
    folder = written(tmp_path, {**GEMMA2, "vocab_size": 514, "eos_token_id": [513, 512]}, added=("[STOP]", "[HALT]"))
    convert_checkpoint(folder, tmp_path / "out.gguf")
    header = read_header(tmp_path / "out.gguf")
    assert (header.get("tokenizer.ggml.eos_token_id"), header.get("tokenizer.ggml.eot_token_id")) == (513, 512)
    assert {512, 513} <= set(ends(tmp_path / "out.gguf", range(514)))


def test_more_eos_tokens_than_llama_cpp_has_keys_for(tmp_path: Path) -> None:
    added = ("[A]", "[B]", "[C]", "<|eot_id|>")
    config = {**LLAMA, "vocab_size": 544, "eos_token_id": [2, 515, 512, 513, 514]}
    (note,) = convert_checkpoint(written(tmp_path, config, added=added), tmp_path / "out.gguf")
    assert note == "eos_token_id: llama.cpp has no more keys for tokens that end a generation; '[C]' will not"
    assert ends(tmp_path / "out.gguf", range(544)) == [2, 512, 513, 515]


# --- chat templates


def template_of(folder: Path, file: Path) -> Any:
    convert_checkpoint(folder, file, force=True)
    return read_header(file).get("tokenizer.chat_template")


def test_chat_template_jinja_goes_before_the_config(tmp_path: Path) -> None:
    folder, file = written(tmp_path, LLAMA), tmp_path / "out.gguf"
    configured = template_of(folder, file)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "OLD"}))
    assert template_of(folder, file) == configured
    (folder / "chat_template.jinja").write_text("NEW")
    assert template_of(folder, file) == "NEW"
    edit(folder / "tokenizer_config.json", lambda data: data.update(chat_template=None))
    (folder / "chat_template.jinja").unlink()
    assert template_of(folder, file) == "OLD"


def test_a_chat_template_without_tokenizer_config(tmp_path: Path) -> None:
    folder = written(tmp_path, LLAMA)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("NEW")
    assert template_of(folder, tmp_path / "out.gguf") == "NEW"


def test_additional_chat_templates_come_with_any_main_one(tmp_path: Path) -> None:
    folder, file = written(tmp_path, LLAMA), tmp_path / "out.gguf"
    configured = template_of(folder, file)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("RAG")
    for main in (configured, "NEW"):
        assert template_of(folder, file) == main
        assert read_header(file).get("tokenizer.chat_template.rag") == "RAG"
        assert read_header(file).array("tokenizer.chat_templates") == ["rag"]
        (folder / "chat_template.jinja").write_text("NEW")
    (folder / "chat_template.jinja").unlink()
    listed = [{"name": "default", "template": "LISTED"}, {"name": "rag", "template": "OLD"}]
    edit(folder / "tokenizer_config.json", lambda data: data.update(chat_template=listed))
    assert template_of(folder, file) == "LISTED"
    assert read_header(file).get("tokenizer.chat_template.rag") == "RAG"
    edit(folder / "tokenizer_config.json", lambda data: data.update(chat_template=None))
    assert template_of(folder, file) is None
    assert read_header(file).get("tokenizer.chat_template.rag") == "RAG"


# --- vocabularies that are not whole


@pytest.mark.parametrize("tokeniser_files", ["model", "json"])
def test_a_byte_without_a_token_is_noted(tokeniser_files: str, tmp_path: Path) -> None:
    """llama.cpp aborts at a text that needs it, so that the samples must not be tried with it, either."""
    folder = written(tmp_path, LLAMA, tokeniser_files=tokeniser_files)
    if tokeniser_files == "json":
        path = folder / "tokenizer.json"
        path.write_bytes(path.read_bytes().replace(b"<0xC3>", b"zqxjkv"))
    else:
        entry = {"content": "zqxjkv", "special": False}
        edit(folder / "tokenizer_config.json", lambda data: data["added_tokens_decoder"].update({str(3 + 0xC3): entry}))
    notes = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert any("1 of 256 bytes have no token, e.g. <0xC3>" in note for note in notes), notes


def test_a_piece_that_is_not_text(tmp_path: Path) -> None:
    folder = written(tmp_path, LLAMA)
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace(b"<0xC3>", b"zq\xffxjk"))
    with pytest.raises(UserError, match=r"tokenizer\.model: a piece is not UTF-8 text"):
        convert_checkpoint(folder, tmp_path / "out.gguf")


def test_special_tokens_of_odd_kinds(tmp_path: Path) -> None:
    folder = written(tmp_path, {**LLAMA, "vocab_size": 514}, tokeniser_files="json", added=("<|im_start|>", "[END]"))
    edit(folder / "tokenizer_config.json", lambda data: data.update(mask_token=["x"], pad_token={"content": ["x"]}))
    convert_checkpoint(folder, tmp_path / "out.gguf")
    assert types_of(tmp_path / "out.gguf")[512:] == [CONTROL, USER_DEFINED]
