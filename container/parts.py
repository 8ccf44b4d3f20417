"""A model in several files, as llama.cpp's gguf-split writes them: all metadata in the first, tensors in each."""

from __future__ import annotations

import re

from .header import GGUFError, Header
from .kinds import later_part
from .reader import read_header

NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def model_parts(header: Header) -> tuple[Header, ...]:
    """Return the headers of all files of a model, in order; one header for a model in one file.

    Raises:
        GGUFError: the file is not the first of several, its name does not give the names of the others, or one of them
            is missing, broken or of another model.
    """
    count = int(header.number("split.count", 0))
    if count <= 1:
        return (header,)
    named = NAME.fullmatch(header.path.name)
    if header.number("split.no", 0) != 0 or not named or named["number"] != "00001" or int(named["count"]) != count:
        raise later_part(header)
    names = [header.path.with_name(f"{named['stem']}-{i + 1:05d}-of-{named['count']}.gguf") for i in range(1, count)]
    parts = (header, *(read_header(name) for name in names))
    for i, part in enumerate(parts):
        if part.number("split.no", -1) != i or part.number("split.count", 0) != count:
            raise GGUFError(f"{part.path}: split.no: {part.get('split.no')!r}, expected {i} of {count}")
    return parts
