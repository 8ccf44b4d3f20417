"""The band that a method reads in, and the file that readings are saved in."""

import json
import math
from contextlib import closing

import pytest
from ropewalk import UserError
from ropewalk.factors import Band, RopeFacts, Schedule
from ropewalk.runtime.measure.readings import Reading, Readings, band_by_method

FACTS = RopeFacts(n_rot=8, freq_base=10_000, original_context=256)
SHORT, LONG = (Band(context=n, rescale_factors=(factor,) * 4) for n, factor in ((256, 1.1), (2048, 8.0)))
TWO = Schedule(facts=FACTS, bands=(SHORT, LONG))


@pytest.mark.parametrize("method", ["none", "pi", "yarn", "schedule"])
def test_a_model_trained_with_two_bands_reads_each_length_in_its_own(method):
    for context, band in ((128, SHORT), (256, SHORT), (257, LONG), (2048, LONG)):
        assert band_by_method(method, context, TWO, TWO).rescale_factors == band.rescale_factors


def test_beyond_its_bands_closed_forms_continue_from_the_last():
    beyond = band_by_method("pi", 4096, TWO, TWO)
    assert beyond.rescale_factors == pytest.approx((16.0,) * 4) and beyond.context == 4096
    unscaled = band_by_method("none", 4096, TWO, TWO)
    assert unscaled.rescale_factors == LONG.rescale_factors and unscaled.context == 4096
    with pytest.raises(UserError):
        band_by_method("schedule", 4096, TWO, TWO)
    with pytest.raises(UserError, match="expected none, schedule"):
        band_by_method("magic", 256, TWO, TWO)


READING = Reading(losses=(2.5, 3.0), n_scored=100, key_loss=0.1, key_found=True, said="12345", seconds=1.0)
KEYS = ("a" * 24, "b" * 24)


def written(path):
    with closing(Readings(path)) as readings:
        for key in KEYS:
            readings.add(key, {"page": "x"}, READING)
    return path.read_bytes()


@pytest.mark.parametrize("cut", [-1, -2, -40, -120])
def test_a_torn_reading_stays_until_there_is_another(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    whole = written(path)
    path.write_bytes(whole[:cut])
    with closing(Readings(path)) as readings:
        assert readings.find(KEYS[0]) == READING
        found = readings.find(KEYS[1])
        assert path.read_bytes() == whole[:cut]
        assert found == (READING if cut == -1 else None)
        readings.add("c" * 24, {"page": "x"}, READING)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert keys == [*KEYS[: 2 if cut == -1 else 1], "c" * 24]


@pytest.mark.parametrize(
    "content",
    [
        '{"key": "my only copy"}',
        '{"key": 7, "text": "my on',
        '{"key": "my on',
        '{"key": "x", "reading": "abc"}\n',
        "[" * 5_000,
        "[" * 5_000 + "\n",
        "9" * 5_000,
        "NaN\n",
    ],
)
def test_another_files_content_is_left_alone(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="line 1 is not a reading"):
        Readings(path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("losses", [math.nan, 1.0]),
        ("losses", [math.inf, 1.0]),
        ("losses", [10**400, 1.0]),
        ("losses", [1e308, 1e308]),
        ("losses", [1.0]),
        ("losses", []),
        ("losses", 3),
        ("key_loss", math.nan),
        ("key_loss", 10**400),
        ("key_loss", "x"),
        ("n_scored", math.nan),
        ("n_scored", math.inf),
        ("n_scored", 10**400),
        ("n_scored", 0),
        ("n_scored", True),
        ("n_scored", 100.0),
        ("key_found", "yes"),
        ("said", 5),
        ("seconds", math.nan),
        ("seconds", 10**400),
    ],
)
def test_the_numbers_of_a_reading_are_checked(tmp_path, name, value):
    path = tmp_path / "r.jsonl"
    first, second = written(path).splitlines()
    record = json.loads(second)
    record["reading"][name] = value
    content = first + b"\n" + json.dumps(record).encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(UserError, match="line 2 is not a reading"):
        Readings(path)
    assert path.read_bytes() == content


def test_losses_that_are_not_finite_are_not_saved(tmp_path):
    with closing(Readings(tmp_path / "r.jsonl")) as readings:
        broken = Reading(losses=(math.nan,), n_scored=10, key_loss=0.1, key_found=False, said="", seconds=1.0)
        with pytest.raises(UserError, match="losses are not finite"):
            readings.add(KEYS[0], {}, broken)
    assert not (tmp_path / "r.jsonl").exists()
