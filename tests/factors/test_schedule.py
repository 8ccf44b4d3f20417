"""The schedule as data: what is refused and with which message, and its file."""

import json

import pytest
from ropewalk.factors import (
    Band,
    Provenance,
    RopeFacts,
    Schedule,
    ScheduleError,
    check_matches,
    read_schedule,
    write_schedule,
)


def schedule(n_rot=8, **more):
    facts = RopeFacts(n_rot=n_rot, freq_base=1e4, original_context=4096, **more)
    found = Provenance(method="longrope", objective="perplexity", data_digest="ab12", seed=7, losses=(3.5, 3.25))
    ones = (1.0,) * (n_rot // 2)
    return Schedule(
        facts=facts,
        bands=(
            Band(context=4096, rescale_factors=ones, found=Provenance(method="native")),
            Band(
                context=16384,
                rescale_factors=tuple(1.1**i + i / 3 for i in range(n_rot // 2)),
                start_tokens=16,
                attention_factor=1.1,
                found=found,
            ),
        ),
    )


def as_dict():
    return json.loads(schedule().model_dump_json())


def test_json_round_trip_is_exact(tmp_path):
    path = tmp_path / "s.json"
    write_schedule(schedule(), path)
    assert read_schedule(path) == schedule()
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.json"]
    assert json.loads(path.read_text())["format_version"] == 1


def test_a_schedule_cannot_be_changed():
    with pytest.raises(ValueError):
        schedule().bands[0].context = 5


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["facts"].update(n_rot=7), "facts.n_rot"),
        (lambda d: d["facts"].update(n_rot=10), "bands.0.rescale_factors: 4 numbers, expected n_rot/2 = 5"),
        (lambda d: d["facts"].update(freq_base=-1), "facts.freq_base"),
        (lambda d: d["facts"].update(native_factors=[1, 2]), "native_factors: 2 numbers, expected n_rot/2 = 4"),
        (lambda d: d["bands"][1].update(context=4096), "bands.1.context: 4096, expected more than 4096"),
        (lambda d: d["bands"][1].update(context="long"), "bands.1.context"),
        (lambda d: d["bands"][1].update(start_tokens=5), "start_tokens: 5, expected one of 0, 1, 2"),
        (lambda d: d["bands"][1].update(start_tokens=-1), "bands.1.start_tokens"),
        (lambda d: d["bands"][1].update(attention_factor=0), "bands.1.attention_factor"),
        (lambda d: d["bands"][1]["rescale_factors"].__setitem__(1, 0), "bands.1.rescale_factors.1"),
        (lambda d: d["bands"][1]["rescale_factors"].__setitem__(1, float("nan")), "bands.1.rescale_factors.1"),
        (lambda d: d["bands"][1]["rescale_factors"].__setitem__(1, float("inf")), "bands.1.rescale_factors.1"),
        (lambda d: d["bands"][1]["rescale_factors"].__setitem__(3, 1), "rescale_factors.3: 1 after"),
        (lambda d: d["bands"][1]["rescale_factors"].__setitem__(0, 1e-9), "bands.1.rescale_factors.0: "),
        (lambda d: d["bands"][1]["rescale_factors"].__setitem__(0, 1e-44), "bands.1.rescale_factors.0: "),
        (lambda d: d["bands"][1]["rescale_factors"].__setitem__(3, 10**400), "bands.1.rescale_factors.3: "),
        (lambda d: d["bands"][1].update(attention_factor=1e300), "bands.1.attention_factor: "),
        (lambda d: d["bands"][1].update(attention_factor=1e30), "bands.1.attention_factor: "),
        (lambda d: d["bands"][1].update(attention_factor=1e-9), "bands.1.attention_factor: "),
        (lambda d: d["facts"].update(native_attention_factor=1e30), "facts.native_attention_factor: "),
        (lambda d: d["facts"].update(native_factors=[1, 1, 1, 1e-9]), "facts.native_factors.3: "),
        (lambda d: d["facts"].update(freq_base=1e-30), "facts.freq_base: "),
        (
            lambda d: d["bands"][1]["found"].update(losses=[3.0] * 131_073),
            "found.losses: Tuple should have at most 131072",
        ),
        (lambda d: d["bands"][1]["found"].update(method="long\ud800"), "bands.1.found.method: "),
        (lambda d: d["bands"][1]["found"].update({"\ud800\x1b[31m": 1}), "bands.1.found"),
        (lambda d: d["bands"][1]["found"].update({"\x1b[31m": 1}), r"bands.1.found.\x1b[31m"),
        (lambda d: d["bands"][1]["found"].update(objective="x" * 5000), "bands.1.found.objective: "),
        (lambda d: d["bands"][1]["found"].update({"x" * 5000: 1}), "bands.1.found.x"),
        (lambda d: d["bands"][1].update(start_tokens=10**400, force_start_tokens=True), "bands.1.start_tokens: "),
        (lambda d: d.update(format_version=10**400), "format_version 1000000000000000000000000000000000000..."),
        (lambda d: d.update(bands=[]), "bands"),
        (lambda d: d.update(format_version=2), "format_version 2 is newer"),
        (lambda d: d.update(typo=1), "typo"),
        (lambda d: d.pop("facts"), "facts: Field required"),
    ],
)
def test_an_error_names_what_is_wrong_in_one_line(tmp_path, change, message):
    data = as_dict()
    change(data)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ScheduleError) as caught:
        read_schedule(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 200


def test_start_tokens_outside_the_set_can_be_forced():
    band = Band(context=100, rescale_factors=(1.0,), start_tokens=5, force_start_tokens=True)
    assert band.start_tokens == 5


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100000, b"\xff\xfe", b"[1, 2]", b"null", b'"x"'])
def test_a_file_that_is_not_a_schedule_is_refused(tmp_path, content):
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(ScheduleError, match=r"s\.json"):
        read_schedule(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ScheduleError, match="cannot read"):
            read_schedule(path)
    with pytest.raises(ScheduleError, match="cannot write"):
        write_schedule(schedule(), tmp_path / "none" / "s.json")


def test_the_smallest_band_that_holds_the_text():
    assert [schedule().band_index(n) for n in (0, 1, 4096, 4097, 16384)] == [0, 0, 0, 1, 1]
    with pytest.raises(ScheduleError, match="16385 tokens are more than the 16384"):
        schedule().band_index(16385)


def test_a_schedule_for_another_model_is_refused():
    check_matches(schedule(), schedule().facts, "x")
    with pytest.raises(ScheduleError, match="x: the schedule is for n_rot 8, the model has 16"):
        check_matches(schedule(), schedule(16).facts, "x")
