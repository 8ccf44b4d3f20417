"""GGUF files that are not a model that runs: adapters, importance matrices, projectors, parts and vocabularies."""

from __future__ import annotations

from .header import GGUFError, Header

NOT_MODELS = {
    "adapter": "a LoRA adapter, expected a model; it can be given to llama.cpp beside its model",
    "imatrix": "an importance matrix (imatrix), expected a model",
    "mmproj": "a multimodal projector (mmproj), expected the language model beside it",
    "clip-vision": "a multimodal projector (mmproj), expected the language model beside it",
}
"""What a file is by its `general.type`."""

NOT_MODEL_ARCHITECTURES = {
    "clip": NOT_MODELS["mmproj"],
    "controlvector": "a control vector, expected a model",
    "imatrix": NOT_MODELS["imatrix"],
}


def check_is_model(header: Header) -> None:
    """Refuse a file that holds something else than a model, or a later part of one.

    Raises:
        GGUFError: the message says what the file is.
    """
    what = NOT_MODELS.get(str(header.get("general.type"))) or NOT_MODEL_ARCHITECTURES.get(
        str(header.get("general.architecture"))
    )
    if what is None and any(key.startswith("imatrix.") for key in header.entries):
        what = NOT_MODELS["imatrix"]
    if what is not None:
        raise GGUFError(f"{header.path}: is {what}")
    if header.number("split.no", 0) != 0:
        raise later_part(header)


def check_has_tensors(header: Header) -> None:
    """Refuse a file that has only a vocabulary.

    Raises:
        GGUFError: it has no tensors.
    """
    if not header.tensors:
        what = "a vocabulary" if "tokenizer.ggml.tokens" in header.entries else "metadata"
        raise GGUFError(f"{header.path}: has {what} and no tensors, expected a whole model")


def later_part(header: Header) -> GGUFError:
    """The error for a part of a model that is not the first, or is not named as such."""
    count = int(header.number("split.count", 0))
    first = f"-00001-of-{count:05d}.gguf"
    return GGUFError(f"{header.path}: one of {count} parts of a model, expected the first, with a name like …{first}")
