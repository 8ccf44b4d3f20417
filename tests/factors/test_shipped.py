"""Schedules that come with Ropewalk: complete, installed, and found by the model's name and facts."""

from importlib.resources import files

import pytest
from ropewalk.container import native_schedule, read_header
from ropewalk.factors import extend, native_band, read_schedule, shipped_file, shipped_schedule, write_schedule
from ropewalk.factors.schedule import RopeFacts, Schedule
from ropewalk.factors.shipped import SCHEDULES

FACTS = RopeFacts(n_rot=8, freq_base=10000.0, original_context=128)
EXTENDED = extend(Schedule(facts=FACTS, bands=(native_band(FACTS),)), 256)


@pytest.fixture
def folder(tmp_path):
    write_schedule(EXTENDED, tmp_path / "Small-1B.json")
    write_schedule(EXTENDED, tmp_path / "Small-1B-Chat.json")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("Small-1B.gguf", "Small-1B"),
        ("small-1b-q8_0.gguf", "Small-1B"),
        ("Small-1B-Chat.Q4_K_M.gguf", "Small-1B-Chat"),
        ("Small-1B-Chatty.gguf", "Small-1B"),
        ("Small-1B2.gguf", None),
        ("Small.gguf", None),
        ("Not-Small-1B.gguf", None),
    ],
)
def test_a_schedule_is_found_by_the_models_name(folder, model, found):
    file = shipped_file(model, folder)
    assert (file.stem if file else None) == found


def test_a_schedule_must_have_the_models_facts(folder):
    assert shipped_schedule("Small-1B.Q8_0.gguf", FACTS, folder) == EXTENDED
    other = FACTS.model_copy(update={"freq_base": 500000.0})
    assert shipped_schedule("Small-1B.Q8_0.gguf", other, folder) is None
    assert shipped_schedule("Else.gguf", FACTS, folder) is None


def test_all_shipped_schedules_are_searched_and_better_than_yarn():
    names = [file.name for file in files("ropewalk.factors").joinpath("schedules").iterdir()]
    assert names and sorted(names) == sorted(path.name for path in SCHEDULES.iterdir())
    for name in names:
        schedule = read_schedule(SCHEDULES / name)
        assert schedule.bands[0] == native_band(schedule.facts)
        searched = [band.found for band in schedule.bands if band.found.method not in ("native", "yarn")]
        assert searched
        for found in searched:
            loss, yarn = found.losses
            assert loss < yarn and found.data_digest and found.seed is not None


def test_the_bundled_model_has_one(smollm2):
    native = native_schedule(read_header(smollm2))
    schedule = shipped_schedule(smollm2.name, native.facts)
    assert schedule is not None and schedule.bands[0] == native.bands[0]
    assert [band.context for band in schedule.bands] == [8192, 16384, 32768, 65536]
    assert all(band.near_tokens and band.plain for band in schedule.bands[1:])
    assert all(band.found.method not in ("native", "yarn") for band in schedule.bands[1:])
