"""Converted tokenisers of every kind give the original's tokens; a broken one is a one-line error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import tiny_checkpoints as checkpoints
import tiny_tokenisers as tokenisers
import varied_text as varied
from ropewalk.convert import convert_checkpoint
from ropewalk.convert.tokeniser.pre_tokeniser import GPT2, GPT4O, LLAMA3, NAMES, QWEN2, SEED, TEKKEN
from ropewalk.errors import UserError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

N_LINES = 10_000
N_SLOW = 1_000  # by some definitions, llama.cpp splits only 20 kB/s
SENTENCEPIECE = {
    "v1": tokenisers.SentencePiece("tokenizer.model.v1", 32000, 32000),
    "v3": tokenisers.SentencePiece("mistral_instruct_tokenizer_240323.model.v3", 32768, 32768),
    "v7": tokenisers.SentencePiece("mistral_instruct_tokenizer_241114.model.v7", 32768, 32768),
}
DEEPSEEK = next(definition for definition, names in NAMES.items() if "deepseek-v3" in names)
DEEPSEEK_CODER = next(definition for definition, names in NAMES.items() if "deepseek-coder" in names)
END = "<|end|>"


def llama_tokens(file: Path, lines: Sequence[str], special: bool = False) -> list[list[int]]:
    llm = llama_cpp.Llama(str(file), vocab_only=True, n_ctx=1, verbose=False)
    try:
        return [llm.tokenize(line.encode(), add_bos=False, special=special) for line in lines]
    finally:
        llm.close()


def differing_lines(file: Path, lines: Sequence[str], encode: Callable[[list[str]], list[list[int]]]) -> list[str]:
    """Lines that llama.cpp, with a converted file, tokenises differently from the original tokeniser."""
    wanted = encode(list(lines))
    assert len({len(tokens) for tokens in wanted}) > 20
    return [line for line, a, b in zip(lines, llama_tokens(file, lines), wanted, strict=True) if a != b]


def encoder(tokeniser: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    return lambda lines: [found.ids for found in tokeniser.encode_batch(lines, add_special_tokens=False)]


def write_model(folder: Path, tokeniser: Any, size: int, files: str = "model") -> Path:
    """A tiny Llama with a tokeniser of `size` tokens."""
    config = {**checkpoints.LLAMA, "vocab_size": size}
    case = checkpoints.Case("tiny", config, tokeniser=tokeniser, tokeniser_files=files)
    if not case.can_be_made():
        pytest.skip(f"{case.needs}, which the tokeniser comes from, is not installed")
    return checkpoints.write_checkpoint(case, folder)


def trained(
    folder: Path,
    definition: Sequence[str],
    *,
    nfc: bool = False,
    ignore_merges: bool = False,
    added: Sequence[str] = (),
) -> tuple[Path, Tokenizer]:
    """A checkpoint with byte-level BPE trained on some of the lines, that splits text as `definition` says."""
    steps = [_step(part) for part in definition]
    if GPT2 not in definition:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokeniser = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokeniser.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokeniser.decoder = decoders.ByteLevel()
    if nfc:
        tokeniser.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokeniser.train_from_iterator(varied.varied_lines(N_LINES)[::4], trainer)
    tokeniser.add_tokens(list(added))
    place = write_model(folder, checkpoints.NEW_BPE, tokeniser.get_vocab_size())
    tokeniser.save(str(place / "tokenizer.json"))
    config = {"bos_token": END, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (place / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return place, tokeniser


def _step(part: str) -> Any:
    if part == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if part == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(part), behavior="isolated")


def pre_of(file: Path) -> str:
    llm = llama_cpp.Llama(str(file), vocab_only=True, n_ctx=1, verbose=False)
    try:
        return llm.metadata["tokenizer.ggml.pre"]
    finally:
        llm.close()


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name, tmp_path):
    from sentencepiece import SentencePieceProcessor

    which = SENTENCEPIECE[name]
    folder = write_model(tmp_path, which, which.size)
    convert_checkpoint(folder, tmp_path / "out.gguf")
    original = SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert differing_lines(tmp_path / "out.gguf", varied.varied_lines(N_LINES), original.encode) == []


def as_bpe(folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[Path, Callable[..., Any]]:
    """A SentencePiece vocabulary in tokenizer.json, with byte fallback, after a `change`; and its encoder."""
    which = SENTENCEPIECE["v3"]
    place = write_model(folder, which, which.size, "json")
    file = place / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    return place, encoder(Tokenizer.from_file(str(file)))


def test_sentencepiece_as_bpe(tmp_path):
    folder, encode = as_bpe(tmp_path, lambda data: None)
    assert convert_checkpoint(folder, tmp_path / "out.gguf") == ()
    assert differing_lines(tmp_path / "out.gguf", varied.varied_lines(N_LINES), encode) == []


def test_sentencepiece_as_bpe_without_a_space_before_the_text(tmp_path):
    """Merges as pairs, as newer files have them."""

    def change(data: dict[str, Any]) -> None:
        data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        data["model"]["merges"] = [pair.split(" ") for pair in data["model"]["merges"]]

    folder, encode = as_bpe(tmp_path, change)
    assert convert_checkpoint(folder, tmp_path / "out.gguf") == ()
    assert differing_lines(tmp_path / "out.gguf", varied.varied_lines(N_LINES), encode) == []


def test_sentencepiece_as_bpe_with_a_space_where_there_is_none(tmp_path):
    """llama.cpp cannot leave out the space before a text that starts with one."""

    def change(data: dict[str, Any]) -> None:
        data["normalizer"] = None
        data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}

    folder, encode = as_bpe(tmp_path, change)
    (note,) = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert "tokeniser: llama.cpp tokenises" in note
    differing = differing_lines(tmp_path / "out.gguf", varied.varied_lines(N_LINES), encode)
    assert differing
    assert all(line.startswith((" ", "▁")) for line in differing)


def test_smollm2(tmp_path):
    folder = write_model(tmp_path, checkpoints.BPE, 49152)
    assert convert_checkpoint(folder, tmp_path / "out.gguf") == ()
    encode = encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    assert differing_lines(tmp_path / "out.gguf", varied.varied_lines(N_LINES), encode) == []
    assert pre_of(tmp_path / "out.gguf") == "smollm"


@pytest.mark.parametrize(
    ("pre", "definition", "options", "n_lines"),
    [
        ("gpt-2", (GPT2,), {}, N_LINES),
        ("llama-bpe", (LLAMA3,), {"ignore_merges": True}, N_LINES),
        ("smaug-bpe", (LLAMA3,), {}, N_LINES),
        ("qwen2", (QWEN2,), {"nfc": True}, N_LINES),
        ("deepseek-v3", DEEPSEEK, {}, N_SLOW),
        ("seed-coder", (SEED,), {}, N_SLOW),
    ],
)
def test_bpe_over_bytes(pre, definition, options, n_lines, tmp_path):
    folder, tokeniser = trained(tmp_path, definition, **options)
    assert convert_checkpoint(folder, tmp_path / "out.gguf") == ()
    lines = varied.varied_lines(N_LINES)[:n_lines]
    if options.get("nfc"):
        lines = varied.composed(lines)  # llama.cpp leaves text as it is
    assert differing_lines(tmp_path / "out.gguf", lines, encoder(tokeniser)) == []
    assert pre_of(tmp_path / "out.gguf") == pre


@pytest.mark.parametrize(
    ("pre", "definition", "noted", "share"),
    [
        ("gpt-4o", (GPT4O,), True, 0.1),
        ("tekken", (TEKKEN,), True, 0.1),
        ("deepseek-coder", DEEPSEEK_CODER, False, 0.01),
    ],
)
def test_where_llama_cpp_splits_more_simply(pre, definition, noted, share, tmp_path):
    """For GPT-4o and Tekken, its expressions treat letters of other scripts as either case, and no marks as letters.

    For DeepSeek Coder, they separate wide spaces from punctuation.
    """
    folder, tokeniser = trained(tmp_path, definition, ignore_merges=pre == "tekken")
    notes = convert_checkpoint(folder, tmp_path / "out.gguf")
    assert [pre in note for note in notes] == [True] * noted
    assert pre_of(tmp_path / "out.gguf") == pre
    lines = varied.varied_lines(N_LINES)[:N_SLOW]
    differing = differing_lines(tmp_path / "out.gguf", lines, encoder(tokeniser))
    assert not any(line.isascii() for line in differing)
    assert len(differing) < share * len(lines)


def test_another_definition_that_splits_like_a_known_one(tmp_path):
    """Llama 3's, written differently: found by trying."""
    expression = LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[stmd]|re|ve|ll)")
    folder, tokeniser = trained(tmp_path, (expression,), ignore_merges=True)
    convert_checkpoint(folder, tmp_path / "out.gguf")
    assert differing_lines(tmp_path / "out.gguf", varied.varied_lines(N_LINES)[:N_SLOW], encoder(tokeniser)) == []


def test_a_definition_that_llama_cpp_lacks(tmp_path):
    folder, _ = trained(tmp_path, (r"[aeiou]+|[^aeiou]+",))
    refused(folder, tmp_path, "pre_tokenizer", "aeiou", "llama.cpp has none")


def test_special_and_added_tokens(tmp_path):
    folder, tokeniser = trained(tmp_path, (LLAMA3,), ignore_merges=True, added=("<tool>", " of the "))
    convert_checkpoint(folder, tmp_path / "out.gguf")
    texts = [f"{END}user\nWhat is <tool> for?{END}\n{END}", "the king of the hill", f"{END}{END}<tool><tool>"]
    assert llama_tokens(tmp_path / "out.gguf", texts, special=True) == encoder(tokeniser)(texts)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder, _ = trained(tmp_path_factory.mktemp("good"), (GPT2,))
    return folder


def refused(folder: Path, tmp_path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        convert_checkpoint(folder, tmp_path / "out.gguf")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def changed(good: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a good checkpoint with something else in its tokenizer.json."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def _named_like_a_gap(data: dict[str, Any]) -> None:
    """The last token is removed, and the first gets the text with which the gap is filled."""
    vocabulary = data["model"]["vocab"]
    last = max(vocabulary, key=lambda text: vocabulary[text])
    assert vocabulary.pop(last) == 2999
    assert "".join(data["model"]["merges"].pop()) == last
    assert vocabulary.pop(END) == 0
    vocabulary["[PAD2999]"], data["added_tokens"] = 0, []


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "no model": (lambda data: data.pop("model"), ("model: missing",)),
    "another kind of model": (lambda data: data["model"].update(type="Unigram"), ("model.type", "'Unigram'", "'BPE'")),
    "a list of tokens": (lambda data: data["model"].update(vocab=["a", "b"]), ("model.vocab",)),
    "no tokens": (lambda data: data["model"].update(vocab={}, merges=[]), ("tokenizer.json", "llama.cpp")),
    "two equal tokens": (_named_like_a_gap, ("tokens 0 and 2,999", "[PAD2999]")),
    "an id below 0": (lambda data: data["model"]["vocab"].update(A=-1), ("model.vocab", "from 0")),
    "an id beyond the model": (lambda data: data["model"]["vocab"].update(qqq=5000), ("5,000", "vocab_size")),
    "a huge id": (lambda data: data["model"]["vocab"].update(qqq=1 << 40), ("model.vocab",)),
    "invalid merges": (lambda data: data["model"].update(merges={"a": "b"}), ("tokenizer.json",)),
    "a merge of three": (lambda data: data["model"]["merges"].append("a b c"), ("tokenizer.json",)),
    "invalid added tokens": (lambda data: data.update(added_tokens={"a": 1}), ("added_tokens", "list")),
    "an added token without text": (lambda data: data["added_tokens"].append({"id": 3}), ("added token", "content")),
    "an added token without an id": (
        lambda data: data["added_tokens"].append({"content": "<x>"}),
        ("added token", "'<x>'", "number from 0"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_tokeniser(mistake, good, tmp_path):
    change, parts = MISTAKES[mistake]
    refused(changed(good, tmp_path, change), tmp_path, *parts)


def test_invalid_and_truncated_json(good, tmp_path):
    folder = changed(good, tmp_path, lambda data: None)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for content in (text[: len(text) // 2], "", "[]", "[" * 100_000):
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        refused(folder, tmp_path, "tokenizer.json")


def test_an_invalid_sentencepiece_model(tmp_path):
    folder = write_model(tmp_path, SENTENCEPIECE["v1"], 32000)
    raw = (folder / "tokenizer.model").read_bytes()
    for content in (b"", b"no model", raw[: len(raw) // 2 + 1]):
        (folder / "tokenizer.model").write_bytes(content)
        refused(folder, tmp_path, "tokenizer.model", "not a SentencePiece model")


def test_tekken_alone(good, tmp_path):
    folder = changed(good, tmp_path, lambda data: None)
    (folder / "tokenizer.json").rename(folder / "tekken.json")
    refused(folder, tmp_path, "tekken.json", "tokenizer.json")


@pytest.mark.parametrize("template", [3, [{"name": "default"}], {"a": "b"}])
def test_an_invalid_template(template, good, tmp_path):
    folder = changed(good, tmp_path, lambda data: None)
    config = {"bos_token": END, "eos_token": END, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(folder, tmp_path, "chat_template")
