"""Models by name: files, patterns, and what other programs have downloaded to this machine.

A name such as `owner/repository`, `owner/repository:Q4_K_M`, `llama3.2:1b` or a file's name without its folder is
looked for in the caches of Hugging Face, llama.cpp, LM Studio and Ollama. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import escape, glob, has_magic
from itertools import islice
from pathlib import Path

from ..errors import UserError

MAX_LISTED = 8
MAX_COMPLETIONS = 100
MAX_SEEN = 20_000  # files of a cache; a folder that is not a model cache may be huge
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
OLLAMA_MODEL = "application/vnd.ollama.image.model"


@dataclass(frozen=True)
class CachedModel:
    """A downloaded model: `owner/repository`, or Ollama's `name:tag`, and the file."""

    repository: str
    path: Path
    file: str

    @property
    def full_name(self) -> str:
        return f"{self.repository}/{self.file}" if self.file else self.repository

    def answers_to(self, name: str) -> bool:
        """Whether `name`, in lower case, means this one."""
        repository, file = self.repository.lower(), self.file.lower()
        if not file:  # Ollama
            return name == repository or f"{name}:latest" == repository
        wanted, _, variant = name.partition(":")
        stem = file.rpartition("/")[2].removesuffix(".gguf")
        in_repository = wanted == repository and (not variant or variant in stem)
        return in_repository or name in (f"{repository}/{file}", file, f"{stem}.gguf", stem)


def find_model(name: str) -> Path:
    """Return the file that `name` stands for.

    Raises:
        UserError: nothing, or several files.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _only(name, _first_parts(path.glob("*.gguf")), "a folder")
    if path.exists():
        return path
    if has_magic(name):
        return _only(name, _first_parts(map(Path, glob(str(path), recursive=True))), "a pattern")  # noqa: PTH207
    wanted = re.sub(r"^(hf\.co/|https://huggingface\.co/|hf://)", "", name).lower()
    found = {model.path.resolve(): model for model in cached_models() if model.answers_to(wanted)}
    if len(found) > 1:  # the usual quantisation, as llama.cpp and Ollama choose it
        found = {path: model for path, model in found.items() if "q4_k_m" in model.file.lower()} or found
    if len(found) == 1:
        return next(iter(found.values())).path
    if found:
        names = sorted(model.full_name for model in found.values())
        raise UserError(f"{name}: {len(names)} models: {_listed(names)}; name one of them")
    if path.suffix.lower() == ".gguf" or path.is_absolute() or name.startswith((".", "~")):
        return path  # reading it gives the reason
    known = sorted({model.repository for model in cached_models()})
    raise UserError(
        f"{name}: no such file, and no downloaded model of that name"
        + (f" (there are {_listed(known)})" if known else "")
        + ("; `hf download` fetches one" if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) else "")
    )


def is_gguf(path: Path) -> bool:
    """Whether the file starts as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def complete_models(incomplete: str) -> list[str]:
    """Offer the model files below what has been typed, and the names of downloaded models, for a shell's completion."""
    with suppress(OSError):
        typed = str(Path(incomplete).expanduser()) if incomplete.startswith("~") else incomplete
        patterns = (f"{escape(typed)}*{below}.gguf" for below in ("", "/*", "/*/*"))
        files = [path for pattern in patterns for path in sorted(glob(pattern))]  # noqa: PTH207
        if incomplete.startswith("~"):
            home = str(Path.home())
            files = [f"~{path.removeprefix(home)}" for path in files]
        models = list(cached_models())
        counts = {name: sum(model.repository == name for model in models) for name in {m.repository for m in models}}
        names = {model.repository if counts[model.repository] == 1 else model.full_name for model in models}
        offered = [*files, *sorted(name for name in names if name.lower().startswith(incomplete.lower()))]
        return [name for name in offered if not LATER_PART.search(name)][:MAX_COMPLETIONS]
    return []


def cached_models() -> Iterator[CachedModel]:
    """Yield the models in the caches of other programs."""
    home = Path.home()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub"
    for snapshot in sorted(_paths(Path(hub), "models--*/snapshots/*")):
        owner = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
        for path in _first_parts(_paths(snapshot, "**/*.gguf")):
            yield CachedModel(owner, path, path.relative_to(snapshot).as_posix())
    for path in _first_parts(_paths(Path(os.environ.get("LLAMA_CACHE") or cache / "llama.cpp"), "*_*_*.gguf")):
        owner, repository, file = path.name.split("_", 2)
        yield CachedModel(f"{owner}/{repository}", path, file)
    for folder in (home / ".lmstudio" / "models", cache / "lm-studio" / "models"):
        for path in _first_parts(_paths(folder, "*/*/*.gguf")):
            yield CachedModel(path.parent.relative_to(folder).as_posix(), path, path.name)
    yield from _of_ollama(Path(os.environ.get("OLLAMA_MODELS") or home / ".ollama" / "models"))


def _of_ollama(folder: Path) -> Iterator[CachedModel]:
    library = folder / "manifests" / "registry.ollama.ai"
    for manifest in sorted(_paths(library, "*/*/*")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            layers = json.loads(manifest.read_text("utf-8"))["layers"]
            (digest,) = (layer["digest"] for layer in layers if layer["mediaType"] == OLLAMA_MODEL)
            blob = folder / "blobs" / str(digest).replace(":", "-")
            if re.fullmatch(r"sha256-[0-9a-f]{64}", blob.name) and blob.is_file():
                owner, name = manifest.parent.relative_to(library).parts
                model = name if owner == "library" else f"{owner}/{name}"
                yield CachedModel(f"{model}:{manifest.name}", blob, "")


def _paths(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(islice(folder.glob(pattern), MAX_SEEN))
    except OSError:
        return []


def _first_parts(paths: Iterator[Path] | list[Path]) -> list[Path]:
    """Return the model files among `paths`: no later parts of split models, and no projectors of vision models."""
    return sorted(
        path
        for path in paths
        if path.suffix.lower() == ".gguf" and not LATER_PART.search(path.name) and "mmproj" not in path.name.lower()
    )


def _only(name: str, files: list[Path], kind: str) -> Path:
    if not files:
        raise UserError(f"{name}: {kind} without GGUF files, expected a model")
    if len(files) > 1:
        raise UserError(f"{name}: {kind} of {len(files)} models: {_listed(map(str, files))}; name one of them")
    return files[0]


def _listed(names: Iterator[str] | list[str] | map[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
