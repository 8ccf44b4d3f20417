"""Prompts on disk: reused by prompts that start the same way; never trusted, never in the way."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ropewalk import files
from ropewalk.container import native_schedule, read_header
from ropewalk.errors import UserError
from ropewalk.factors import extend
from ropewalk.runtime import Llama, session
from ropewalk.runtime.chat.answer import Answer, Sampling
from ropewalk.runtime.chat.conversation import Conversation
from ropewalk.runtime.chat.summary import Summarizer, Summary, SummarySettings
from ropewalk.runtime.prompt_cache import PromptCache, PromptFolder

GIB = 1 << 30
TOKENS = np.random.default_rng(0).integers(3, 90, 3000).tolist()

Load = Callable[..., Llama]


@pytest.fixture(scope="module")
def tiny(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("cache") / "tiny.gguf", context_length=2048, n_embd=128)


@pytest.fixture
def load(tiny: Path) -> Iterator[Load]:
    """Load a model as if in a new process: nothing is shared with earlier ones."""
    opened: list[Llama] = []

    def load(path: Path = tiny, **options: Any) -> Llama:
        options = {"n_ctx": 4096, "kv": "q8_0", "flash_attn": True, "n_threads": 2, "verbose": False, **options}
        if "schedule" not in options:
            options["schedule"] = extend(native_schedule(read_header(path)), 4096)
        opened.append(Llama(path, **options))
        return opened[-1]

    yield load
    for llm in opened:
        llm.close()


def cache(llm: Llama, folder: Path, limit: int = GIB, notes: list[str] | None = None) -> PromptCache:
    return PromptCache(llm, PromptFolder(folder, limit), [].append if notes is None else notes.append)


def next_logits(llm: Llama, tokens: list[int]) -> np.ndarray:
    llm.eval(tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def entries(folder: Path) -> set[Path]:
    return set(folder.glob("prompt-*.safetensors"))


def test_a_kept_prompt_is_reused_after_a_restart_with_the_same_logits(load: Load, tmp_path: Path) -> None:
    first, second = load(), load()
    assert cache(first, tmp_path / "new" / "folder").read(TOKENS[:1500]) == 1500
    expected = next_logits(first, TOKENS[1500:1520])
    assert cache(second, tmp_path / "new" / "folder").read(TOKENS[:1500]) == 0
    np.testing.assert_array_equal(next_logits(second, TOKENS[1500:1520]), expected)
    assert len(names(tmp_path / "new" / "folder")) == 1


def test_a_prompt_that_starts_the_same_reads_only_the_rest(load: Load, tmp_path: Path) -> None:
    cache(load(), tmp_path).read(TOKENS[:1500])
    llm = load()
    other = [*TOKENS[:1200], *TOKENS[2000:2100]]
    assert cache(llm, tmp_path).read(other) == 100
    assert llm.input_ids[: llm.n_tokens].tolist() == other
    assert cache(llm, tmp_path).read(TOKENS[:1000]) == 0  # the model has those
    plain = load()
    plain.eval(TOKENS[:1000])
    np.testing.assert_allclose(next_logits(llm, TOKENS[9:19]), next_logits(plain, TOKENS[9:19]), atol=0.05)
    assert cache(load(), tmp_path).read([*TOKENS[:400], *TOKENS[2000:2100]]) == 500  # too few to pay off
    assert len(entries(tmp_path)) == 1  # what is read quickly is not kept


def test_the_entry_that_saves_most_is_loaded_from_any_band(load: Load, tmp_path: Path) -> None:
    kept = cache(load(), tmp_path)
    kept.read(TOKENS[:700])
    kept.read(TOKENS[:2600])  # moves to the long band
    assert len(entries(tmp_path)) == 2
    llm = load()
    loaded: list[int] = []
    llm.on_band_change = lambda change: loaded.append(change.n_tokens)
    assert cache(llm, tmp_path).read(TOKENS[:710]) == 10  # from the short entry, which loads faster
    assert not loaded
    assert cache(llm, tmp_path).read(TOKENS[:1500]) == 0
    llm.eval(TOKENS[1500:1510])
    assert llm.band_index == 0 and loaded == [1500]  # rotated back, after the rest was dropped


def test_another_model_schedule_cache_or_way_of_computing_is_a_miss(
    load: Load, tiny: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    cache(load(), folder).read(TOKENS[:800])
    other = tiny_llama(tmp_path / "other.gguf", context_length=2048, n_embd=128, seed=1)
    assert other.stat().st_size == tiny.stat().st_size
    ntk = extend(native_schedule(read_header(tiny)), 4096, "ntk")
    changes: list[dict[str, Any]] = [
        {"path": other},
        {"schedule": ntk},
        {"kv": "f16"},
        {"kv": "f16", "flash_attn": False},
        {"fast_prefill": False},
        {"n_batch": 256},
    ]
    for changed in changes:
        assert cache(load(**changed), folder).read(TOKENS[:800]) == 800, changed
    assert len(names(folder)) == 1 + len(changes)
    (tmp_path / "moved.gguf").write_bytes(tiny.read_bytes())
    assert cache(load(path=tmp_path / "moved.gguf", n_ctx=2000), folder).read(TOKENS[:800]) == 0
    assert cache(load(n_ctx=700), folder).read(TOKENS[:600]) == 600  # the entry does not fit there, and stays
    assert len(names(folder)) == 2 + len(changes)


def test_short_prompts_are_not_kept_and_kept_ones_not_written_again(load: Load, tmp_path: Path) -> None:
    kept = cache(load(), tmp_path)
    kept.read(TOKENS[:400])
    assert names(tmp_path) == []
    kept.read(TOKENS[:1000])
    (path,) = tmp_path.iterdir()
    os.utime(path, (1, 1))
    before = path.stat().st_ino
    cache(load(), tmp_path).read(TOKENS[:1000])
    assert path.stat().st_ino == before and path.stat().st_mtime > 1


def test_beyond_the_limit_the_least_recently_used_entry_is_removed(load: Load, tmp_path: Path) -> None:
    llm = load()
    cache(llm, tmp_path).read(TOKENS[:800])
    (first,) = entries(tmp_path)
    size = first.stat().st_size
    assert size == session.size(llm)
    foreign = {
        tmp_path / "notes.txt": b"x" * 10 * size,
        tmp_path / first.name.replace("prompt", "Prompt"): b"x" * 10 * size,
        tmp_path / "prompt-1.safetensors": b"x" * 10 * size,
        tmp_path / ".notes.part": b"",
    }
    for path, content in foreign.items():
        path.write_bytes(content)
    (tmp_path / first.name.replace("prompt-", "prompt-0")[:-13]).mkdir()
    limited = cache(llm, tmp_path, 2 * size)
    limited.read(TOKENS[100:900])
    (second,) = entries(tmp_path) - {first, *foreign}
    os.utime(first, (2, 2))
    os.utime(second, (1, 1))
    limited.read(TOKENS[200:1000])
    left = entries(tmp_path)
    assert first in left and second not in left and len(left - set(foreign)) == 2
    notes: list[str] = []
    small = cache(llm, tmp_path, size - 1, notes)
    for start in (300, 400):
        assert small.read(TOKENS[start : start + 800]) == 800  # one that never fits removes nothing
    assert entries(tmp_path) == left and all(path.read_bytes() == content for path, content in foreign.items())
    assert len(notes) == 1 and notes[0].startswith("800 tokens are not kept: ")


def test_a_damaged_entry_is_removed_and_the_prompt_read(load: Load, tmp_path: Path) -> None:
    llm = load()
    kept = cache(llm, tmp_path)
    kept.read(TOKENS[:800])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    cuts = [whole[:n] for n in (0, 4, 100, head, head + 100, len(whole) // 2, len(whole) - 1)]
    flips = []
    for at in (3, 9, head - 60, head, head + 3, head + 3200, head + 3212, len(whole) // 2, len(whole) - 1):
        flips.append(bytearray(whole))
        flips[-1][at] ^= 0x55
    grown = [whole + b"\0", len(whole).to_bytes(8, "little") + whole[8:], b"\xff" * 8 + whole[8:]]
    for damaged in (*cuts, *flips, *grown):
        path.write_bytes(damaged)
        llm.reset()
        assert kept.read(TOKENS[:800]) == 800 and llm.n_tokens == 800
        assert path.read_bytes() == whole
        llm.reset()
        assert kept.read(TOKENS[:800]) == 0


def rewrite(path: Path, *, tokens: Any = None, state: Any = None, facts: dict[str, str] | None = None) -> None:
    """Replace parts of an entry with hostile ones, with a correct digest."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, framework="numpy") as file:
        old = {name: file.get_tensor(name) for name in ("tokens", "state")}
        metadata = file.metadata()
    tokens = old["tokens"] if tokens is None else tokens
    state = old["state"] if state is None else state
    if tokens.dtype == np.int32 and state.dtype == np.uint8:
        metadata["digest"] = session._digest(tokens, state)
    save_file({"tokens": tokens, "state": state}, path, metadata={**metadata, **(facts or {})})


def state_with(path: Path, at: int, values: list[int]) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        state = file.get_tensor("state").copy()
    state[at : at + 4 * len(values)] = np.array(values, dtype="<u4").view(np.uint8)
    return state


def band_with(llm: Llama, **changes: Any) -> dict[str, str]:
    return {"band": json.dumps({**json.loads(llm.band.model_dump_json()), **changes})}


HOSTILE: dict[str, Callable[[Path, Llama], None]] = {
    "tokens out of vocabulary": lambda path, llm: rewrite(path, tokens=np.array([*TOKENS[:799], 10**6], np.int32)),
    "negative tokens": lambda path, llm: rewrite(path, tokens=np.array([*TOKENS[:799], -1], np.int32)),
    "tokens of another type": lambda path, llm: rewrite(path, tokens=np.array(TOKENS[:800], np.int64)),
    "tokens of another shape": lambda path, llm: rewrite(path, tokens=np.array([TOKENS[:800]] * 2, np.int32)),
    "more tokens": lambda path, llm: rewrite(path, tokens=np.array(TOKENS[:900], np.int32)),
    "a state of another type": lambda path, llm: rewrite(path, state=np.zeros(10, np.float64)),
    "no state": lambda path, llm: rewrite(path, state=np.zeros(0, np.uint8)),
    "a state of noise": lambda path, llm: rewrite(path, state=np.arange(20000).astype(np.uint8)),
    "too large a state": lambda path, llm: rewrite(path, state=np.zeros(64 << 20, np.uint8)),
    "a longer state": lambda path, llm: rewrite(path, state=np.append(state_with(path, 0, []), np.uint8(0))),
    "more streams": lambda path, llm: rewrite(path, state=state_with(path, 8, [2**31])),
    "more cells": lambda path, llm: rewrite(path, state=state_with(path, 12, [2**32 - 1])),
    "other positions": lambda path, llm: rewrite(path, state=state_with(path, 16 + 12 * 799, [2**30])),
    "too many factors": lambda path, llm: rewrite(path, facts=band_with(llm, rescale_factors=[1.0] * 64)),
    "no band": lambda path, llm: rewrite(path, facts={"band": "{}"}),
    "no facts": lambda path, llm: rewrite(path, facts={"facts": "no"}),
    "another format": lambda path, llm: rewrite(path, facts={"format": "ropewalk-session-9"}),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_entry_is_a_miss(load: Load, tmp_path: Path, damage: Callable[[Path, Llama], None]) -> None:
    llm = load()
    kept = cache(llm, tmp_path)
    kept.read(TOKENS[:800])
    expected = next_logits(llm, TOKENS[800:810])
    (path,) = tmp_path.iterdir()
    damage(path, llm)
    llm.reset()
    assert kept.read(TOKENS[:800]) == 800
    np.testing.assert_array_equal(next_logits(llm, TOKENS[800:810]), expected)
    llm.reset()
    assert kept.read(TOKENS[:800]) == 0


def test_an_entry_that_another_process_removes_is_a_miss(load: Load, tmp_path: Path) -> None:
    first, second = cache(load(), tmp_path), cache(load(), tmp_path)
    first.read(TOKENS[:800])
    for path in tmp_path.iterdir():
        path.unlink()
    assert second.read(TOKENS[:800]) == 800
    assert len(entries(tmp_path)) == 1


def test_hundreds_of_entries_are_searched_quickly(load: Load, tmp_path: Path) -> None:
    llm = load()
    kept = cache(llm, tmp_path)
    kept.read(TOKENS[:800])
    (path,) = tmp_path.iterdir()
    kind, start, _ = path.stem.removeprefix("prompt-").split("-")
    for i in range(400):
        other = f"{kind}-{start}-{i:016x}" if i < 100 else f"{kind}-{i:016x}-{i:016x}"
        (tmp_path / f"prompt-{other}.safetensors").write_bytes(path.read_bytes())
    llm.reset()
    started = time.perf_counter()
    assert kept.read(TOKENS[:800]) == 0
    assert time.perf_counter() - started < 2


def test_a_folder_that_cannot_be_used_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, reason in (("file", "not a folder"), ("file/below", "cannot keep prompts there: ")):
        with pytest.raises(UserError, match=f"{place}: {reason}") as refused:
            PromptFolder(tmp_path / place, GIB)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="/proc/ropewalk: cannot keep prompts there: "):
        PromptFolder("/proc/ropewalk", GIB)


def test_a_folder_that_disappears_is_reported_once(load: Load, tmp_path: Path) -> None:
    notes: list[str] = []
    llm = load()
    kept = cache(llm, tmp_path / "folder", GIB, notes)
    (tmp_path / "folder").rmdir()
    assert kept.read(TOKENS[:800]) == 800
    assert kept.read(TOKENS[100:900]) == 800
    assert len(notes) == 1 and notes[0].startswith("prompts are no longer kept: ") and "\n" not in notes[0]
    assert list(tmp_path.iterdir()) == []


JOB = """
    import resource, sys
    from ropewalk.container import native_schedule, read_header
    from ropewalk.factors import extend
    from ropewalk.runtime import Llama
    from ropewalk.runtime.prompt_cache import PromptCache, PromptFolder

    model, folder, limit, n_prompts, entry_bytes = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    schedule = extend(native_schedule(read_header(model)), 4096)
    llm = Llama(model, n_ctx=4096, kv="q8_0", flash_attn=True, schedule=schedule, n_threads=1, verbose=False)
    cache = PromptCache(llm, PromptFolder(folder, limit), lambda line: print(line, flush=True))
    print("ready", flush=True)
    if entry_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (entry_bytes, entry_bytes))
    for i in range(n_prompts):
        llm.reset()
        cache.read([3 + (i * 7 + j) % 80 for j in range(700)])
        assert llm.n_tokens == 700
    print("done")
"""


def job(model: Path, folder: Path, limit: int, n_prompts: int, entry_bytes: int = 0) -> subprocess.Popen[str]:
    arguments = [str(argument) for argument in (model, folder, limit, n_prompts, entry_bytes)]
    code = textwrap.dedent(JOB)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_kill_at_any_moment_leaves_nothing_harmful(load: Load, tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):
        jobs = [job(tiny, tmp_path, 2_000_000, 10_000) for _ in range(2)]  # two at once
        for one in jobs:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        time.sleep(float(rng.uniform(0.05, 0.4)))
        for one in jobs:
            os.kill(one.pid, signal.SIGKILL)  # not waited for: a zombie is dead, too
        time.sleep(0.05)
        PromptFolder(tmp_path, GIB)
        assert not [name for name in names(tmp_path) if name.endswith(".part")]
        for one in jobs:
            one.communicate()
    llm = load()
    kept = cache(llm, tmp_path)
    for i in range(8):
        tokens = [3 + (i * 7 + j) % 80 for j in range(700)]
        llm.reset()
        assert kept.read(tokens) in (0, 700) and llm.n_tokens == 700
        llm.reset()
        assert kept.read(tokens) == 0


def test_the_part_file_of_a_live_run_stays(tmp_path: Path) -> None:
    name = ".prompt-" + "-".join(["0" * 16] * 3) + ".safetensors.0000000000000000.part"
    with (tmp_path / name).open("wb") as file:
        files.lock(file.fileno())
        PromptFolder(tmp_path, GIB)
        assert names(tmp_path) == [name]
    PromptFolder(tmp_path, GIB)
    assert names(tmp_path) == []


def test_several_processes_share_one_limit(tiny: Path, tmp_path: Path) -> None:
    jobs = [job(tiny, tmp_path, 1_000_000, 12) for _ in range(2)]
    assert [one.communicate()[0] for one in jobs] == ["ready\ndone\n"] * 2
    sizes = [path.stat().st_size for path in entries(tmp_path)]
    assert len(sizes) == len(names(tmp_path)) > 1
    assert sum(sizes) <= 1_000_000 + max(sizes)


def test_a_full_disk_is_reported_and_work_continues(tiny: Path, tmp_path: Path) -> None:
    output, _ = job(tiny, tmp_path, GIB, 2, entry_bytes=20_000).communicate()
    ready, note, done = output.splitlines()
    assert (ready, done) == ("ready", "done")
    assert note.startswith("prompts are no longer kept: ") and note.endswith("File too large")
    assert names(tmp_path) == []


def test_an_interrupt_while_a_prompt_is_read_leaves_no_file(load: Load, tmp_path: Path) -> None:
    llm = load()

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    llm.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        cache(llm, tmp_path).read(TOKENS[:1500])
    assert names(tmp_path) == []
    llm.on_progress = None
    assert cache(llm, tmp_path).read(TOKENS[:1500]) < 1500


# --- in conversations and summaries

DOCUMENT = pydoc_data.topics.topics["with"]  # some 800 tokens
TEXT = DOCUMENT[:1200]  # about as many for the tiny model


@pytest.fixture
def model(load: Load, smollm2: Path) -> Callable[[], Llama]:
    return lambda: load(smollm2, n_ctx=2048, schedule=None, kv="auto", n_threads=1)


def test_another_question_to_a_document_reads_only_the_question(model: Callable[[], Llama], tmp_path: Path) -> None:
    def ask(question: str) -> tuple[int, Answer]:
        llm = model()
        talk = Conversation(llm, cache=cache(llm, tmp_path))
        n_read = talk.read("doc.txt", DOCUMENT)
        return n_read, talk.ask(question, Sampling(max_tokens=8))

    n_read, first = ask("What is a context manager?")
    assert n_read > 512
    again, answer = ask("What is a context manager?")
    assert (again, answer.text) == (0, first.text)
    assert answer.read_tokens == first.read_tokens < 40
    again, answer = ask("\n- What is a suite?")
    assert again == 0 and answer.read_tokens < 40
    assert len(names(tmp_path)) == 1


def test_the_common_start_of_a_long_question_is_reused(load: Load, tmp_path: Path) -> None:
    def ask(question: str) -> Answer:
        llm = load(kv="f16")
        return Conversation(llm, cache=cache(llm, tmp_path)).ask(question, Sampling(max_tokens=8))

    first = ask(f"{TEXT}\n\nWhat is a context manager?")
    assert first.read_tokens == first.prompt_tokens > 512
    again = ask(f"{TEXT}\n\nWhat is a context manager?")
    assert (again.read_tokens, again.text) == (1, first.text)
    assert ask(f"{TEXT}\n\nWhat is a suite?").read_tokens < 40
    assert len(names(tmp_path)) == 1


def test_an_interrupted_long_question_is_dropped(load: Load, tmp_path: Path) -> None:
    llm = load()
    talk = Conversation(llm, cache=cache(llm, tmp_path))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    llm.on_progress = interrupt
    assert talk.ask(TEXT, Sampling(max_tokens=8)).ending == "interrupted"
    assert talk.transcript.messages == () and names(tmp_path) == []


def test_summaries_with_another_prompt_do_not_read_the_document_again(
    model: Callable[[], Llama], tmp_path: Path
) -> None:
    def summarize(prompt: str, text: str = f"\n {DOCUMENT} \n\n") -> Summary:
        llm = model()
        settings = SummarySettings(prompt=prompt, max_tokens=8)
        return Summarizer(llm, settings, cache(llm, tmp_path)).summarize(text)

    first = summarize("Summarise the text.")
    assert 512 < first.read_tokens < 1.1 * first.n_tokens
    assert summarize("* What is it about?").read_tokens < 40
    again = summarize("Summarise the text.")
    assert again.text == first.text and again.read_tokens < 40
    assert len(names(tmp_path)) == 1


def test_each_part_of_a_long_document_is_kept(load: Load, tmp_path: Path) -> None:
    def summarize(prompt: str) -> Summary:
        llm = load(n_ctx=1500)
        settings = SummarySettings(prompt=prompt, max_tokens=16)
        return Summarizer(llm, settings, cache(llm, tmp_path)).summarize(f"{TEXT}\n\n{DOCUMENT[1200:2400]}")

    first = summarize("Summarise the text.")
    assert first.parts >= 2 and len(names(tmp_path)) == first.parts
    second = summarize("What is it about, in a few words?")
    assert second.parts == first.parts and second.read_tokens < first.read_tokens / 4


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702, 0o772])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UserError, match=rf"others may write to it \(mode {mode:o}\).*chmod go-w"):
        PromptFolder(folder, GIB)
    folder.chmod(mode & ~0o022)
    PromptFolder(folder, GIB)
    (tmp_path / "link").symlink_to(folder)
    folder.chmod(mode)
    with pytest.raises(UserError, match="others may write"):
        PromptFolder(tmp_path / "link", GIB)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_group_of_several_users_and_another_owner(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o770)
    PromptFolder(folder, GIB)  # root's own group
    os.chown(folder, -1, 4321)
    with pytest.raises(UserError, match="others may write"):
        PromptFolder(folder, GIB)
    os.chown(folder, 4321, 0)
    folder.chmod(0o755)
    with pytest.raises(UserError, match="another user's folder"):
        PromptFolder(folder, GIB)


def test_a_folder_that_is_created_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        PromptFolder(tmp_path / "a" / "b", GIB)
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0
