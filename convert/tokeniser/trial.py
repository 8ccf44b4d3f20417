"""A vocabulary tried in llama.cpp: what it makes of texts, before the file itself is written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter

from ...errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their types, and scores or merges; `path` is the file that they come from."""

    path: Path
    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()

    def check_different(self) -> None:
        """llama.cpp stops the program where two tokens are written alike.

        Raises:
            UserError: two are.
        """
        if len(set(self.tokens)) == len(self.tokens):
            return
        first: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            if first.setdefault(text, i) != i:
                raise UserError(
                    f"{self.path}: tokens {first[text]:,} and {i:,} are both {text!r:.40}, expected different ones"
                )

    def write(self, writer: GGUFWriter, pre: str) -> None:
        """All but the merges, which llama.cpp's converter writes later."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(list(self.tokens))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))


def tokens_of(
    vocabulary: Vocabulary, pre: str, texts: Sequence[str], space_prefix: bool | None = None
) -> list[list[int]]:
    """What llama.cpp makes of texts.

    Args:
        pre: the pre-tokeniser's name.
        space_prefix: whether a space goes before a text; None for what llama.cpp takes to be so.

    Raises:
        UserError: llama.cpp does not take the vocabulary.
    """
    import llama_cpp

    with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter(path, "llama")
        vocabulary.write(writer, pre)
        if vocabulary.merges:
            writer.add_token_merges(list(vocabulary.merges))
        if space_prefix is not None:
            writer.add_add_space_prefix(space_prefix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        try:
            llm = llama_cpp.Llama(str(path), vocab_only=True, n_ctx=1, verbose=False)
        except ValueError:
            raise UserError(f"{vocabulary.path}: llama.cpp does not take its vocabulary") from None
        try:
            return [llm.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
        finally:
            llm.close()
