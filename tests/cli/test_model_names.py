"""Models by name: paths, patterns, and the caches of other programs, as those programs lay them out."""

import hashlib
import json
from pathlib import Path

import pytest
from ropewalk.cli.model_names import complete_models, find_model
from ropewalk.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "LLAMA_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return home


def make(path, data=b"GGUF"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def caches(home):
    hub = home / ".cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-GGUF/snapshots/0123abc"
    two = home / ".cache/huggingface/hub/models--acme--Two-GGUF/snapshots/0123abc"
    make(two / "mmproj-two.gguf")
    make(two / "two-big-00002-of-00002.gguf")
    blob = f"sha256-{hashlib.sha256(b'x').hexdigest()}"
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": blob.replace("-", ":")},
    ]
    ollama = home / ".ollama/models"
    for name in ("library/llama3.2/1b", "library/tiny/latest", "me/mine/latest"):
        make(ollama / "manifests/registry.ollama.ai" / name, json.dumps({"layers": layers}).encode())
    make(ollama / "manifests/registry.ollama.ai/library/broken/latest", b"[")
    make(ollama / "manifests/registry.ollama.ai/library/empty/latest", b'{"layers": []}')
    return {
        "hub": make(hub / "smollm2-q8_0.gguf"),
        "q4": make(two / "two-Q4_K_M.gguf"),
        "q8": make(two / "two-Q8_0.gguf"),
        "split": make(two / "two-big-00001-of-00002.gguf"),
        "llama.cpp": make(home / ".cache/llama.cpp/ggml-org_gemma-GGUF_gemma-f16.gguf"),
        "studio": make(home / ".lmstudio/models/acme/studio/studio-q4.gguf"),
        "ollama": make(ollama / "blobs" / blob),
    }


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("HuggingFaceTB/SmolLM2-GGUF", "hub"),
        ("huggingfacetb/smollm2-gguf:Q8_0", "hub"),
        ("hf.co/HuggingFaceTB/SmolLM2-GGUF", "hub"),
        ("HuggingFaceTB/SmolLM2-GGUF/smollm2-q8_0.gguf", "hub"),
        ("smollm2-q8_0.gguf", "hub"),
        ("smollm2-q8_0", "hub"),
        ("acme/Two-GGUF", "q4"),
        ("acme/Two-GGUF:Q8_0", "q8"),
        ("ggml-org/gemma-GGUF", "llama.cpp"),
        ("acme/studio", "studio"),
        ("llama3.2:1b", "ollama"),
        ("tiny", "ollama"),
        ("me/mine", "ollama"),
    ],
)
def test_a_downloaded_model_is_found_by_its_name(caches, name, which):
    assert find_model(name) == caches[which]


def test_files_patterns_and_folders(home, tmp_path):
    one = make(tmp_path / "models/one.gguf")
    for name in ("models/one.gguf", str(one), "models", "models/*.gguf", "m*/o*"):
        assert find_model(name).resolve() == one
    make(tmp_path / "models/one-00002-of-00002.gguf")
    assert find_model("models/*.gguf").resolve() == one
    make(home / "two.gguf")
    assert find_model("~/two.gguf") == home / "two.gguf"
    make(tmp_path / "models/two.gguf")
    with pytest.raises(UserError, match=r"models/\*: a pattern of 2 models: models/one.gguf, models/two.gguf; name"):
        find_model("models/*")
    assert find_model("missing.gguf") == Path("missing.gguf")  # reading it says what is wrong


def test_a_name_that_means_nothing_says_what_there_is(caches):
    with pytest.raises(UserError, match=r"nosuch: no such file, and no downloaded .*\(there are .*acme/Two-GGUF"):
        find_model("nosuch")
    with pytest.raises(UserError, match="`hf download` fetches one"):
        find_model("acme/three")
    caches["q4"].rename(caches["q4"].with_name("two-Q5_0.gguf"))
    with pytest.raises(UserError, match=r"acme/Two-GGUF:two: 3 models: acme/Two-GGUF/two-Q5_0.gguf, .*; name one"):
        find_model("acme/Two-GGUF:two")


def test_completion_offers_model_files_and_names(caches, home, tmp_path):
    for name in ("models/one.gguf", "models/deep/two.gguf", "models/deep/two-00002-of-00002.gguf", "models/notes.txt"):
        make(tmp_path / name)
    assert complete_models("mod") == ["models/one.gguf", "models/deep/two.gguf"]
    assert complete_models("models/deep/") == ["models/deep/two.gguf"]
    assert complete_models("huggingf") == ["HuggingFaceTB/SmolLM2-GGUF"]
    assert "acme/Two-GGUF/two-Q8_0.gguf" in complete_models("acme/")
    make(home / "three.gguf")
    assert complete_models("~/th") == ["~/three.gguf"]
    assert complete_models("[") == []
