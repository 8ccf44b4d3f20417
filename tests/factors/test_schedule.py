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
    assert json.loads(path.read_text())["format_version"] == 2


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
        (lambda d: d.update(format_version=3), "format_version 3 is newer"),
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


def windowed(**changes):
    """A schedule in JSON whose second band has a near window and a plain form."""
    data = as_dict()
    plain = {"context": 16384, "rescale_factors": [1, 1, 2, 4]}
    data["bands"][1].update({"near_tokens": 1024, "rescale_factors": [2, 2, 3, 4], "plain": plain, **changes})
    return data


def test_a_near_window_and_its_plain_band_are_kept(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(windowed()))
    band = read_schedule(path).bands[1]
    assert (band.near_tokens, band.plain.rescale_factors) == (1024, (1, 1, 2, 4))
    write_schedule(read_schedule(path), tmp_path / "again.json")
    assert read_schedule(tmp_path / "again.json") == read_schedule(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"near_tokens": -1}, "bands.1.near_tokens: "),
        ({"near_tokens": 4097}, "bands.1.near_tokens: 4097, expected at most the original context, 4096"),
        ({"near_tokens": 16384}, "near_tokens: 16384, expected less than the context, 16384"),
        ({"near_tokens": 8}, "start_tokens: 16, expected at most near_tokens, 8"),
        ({"rescale_factors": [1, 0.5, 2, 3], "found": {}}, "rescale_factors.1: 0.5, expected at least 1 beyond"),
        ({"plain": {"context": 8192, "rescale_factors": [1, 1, 1, 1]}}, "without near_tokens for the same context"),
        ({"plain": {"context": 16384, "rescale_factors": [1, 1]}}, "bands.1.plain.rescale_factors: 2 numbers"),
        ({"near_tokens": 0}, "plain: there already, expected it in a band with near_tokens alone"),
        ({"plain": {"plain": {}}}, "bands.1.plain: expected no plain band in a plain band"),
        ({"plain": [1]}, "bands.1.plain: "),
        ({"start_tokens": 4, "plain": {"context": 16384}}, "bands.1.plain.rescale_factors: Field required"),
    ],
)
def test_a_near_window_that_cannot_be_is_one_line(tmp_path, changes, message):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(windowed(**changes)))
    with pytest.raises(ScheduleError) as caught:
        read_schedule(path)
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_a_file_of_version_1_is_read_and_written_as_version_2(tmp_path):
    path, data = tmp_path / "s.json", as_dict()
    for band in data["bands"]:
        del band["near_tokens"], band["plain"]
    path.write_text(json.dumps({**data, "format_version": 1}))
    assert read_schedule(path) == schedule()
    write_schedule(read_schedule(path), path)
    assert json.loads(path.read_text())["format_version"] == 2


def test_the_fastest_pairs_may_stand_still_beyond_a_near_window(tmp_path):
    def read(factors, **changes):
        data = windowed(rescale_factors=factors, found={"method": "cma"}, **changes)
        (tmp_path / "s.json").write_text(json.dumps(data))
        return read_schedule(tmp_path / "s.json").bands[1]

    band = read([1e6, 2e6, 3, 4])
    assert band.still_pairs == 2 and band.moving_factors == (3, 4)
    assert [read(factors).still_pairs for factors in ([2, 2, 3, 1e6], [1e6] * 4)] == [0, 3]
    with pytest.raises(ScheduleError, match=r"rescale_factors.2: 3 after 999999, expected non-decreasing numbers"):
        read([1e6, 999999, 3, 4])
    with pytest.raises(ScheduleError, match=r"rescale_factors.3: 3 after 4, expected non-decreasing"):
        read([1e6, 1e6, 4, 3])
    with pytest.raises(ScheduleError, match=r"rescale_factors.1: 2 after 1e\+06, expected non-decreasing"):
        read([1e6, 2, 3, 4], near_tokens=0, plain=None)


@pytest.mark.parametrize("name", ["near_tokens", "plain"])
def test_a_file_of_version_1_has_no_near_window(tmp_path, name):
    path, data = tmp_path / "s.json", as_dict()
    for band in data["bands"]:
        del band["near_tokens"], band["plain"]
    data["bands"][1][name] = windowed()["bands"][1][name]
    path.write_text(json.dumps({**data, "format_version": 1}))
    with pytest.raises(ScheduleError, match=rf"s.json: bands.1.{name}: not in format_version 1, expected"):
        read_schedule(path)


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
