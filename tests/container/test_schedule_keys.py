"""The `ropewalk.` metadata: what is written is read back, and an error names the key."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from ropewalk.container import embedded_schedule, native_schedule, read_header, schedule_of, schedule_values
from ropewalk.container.values import ARRAY, F64, STRING, U32, Value
from ropewalk.convert import embed_schedule
from ropewalk.errors import UserError
from ropewalk.factors import Band, Provenance, RopeFacts, Schedule, extend, native_band

FACTS = RopeFacts(n_rot=32, freq_base=10000.0, original_context=256)
NATIVE = Schedule(facts=FACTS, bands=(native_band(FACTS),))


def write(path: Path, values: list[Value]) -> Path:
    """Write the values with the gguf package's own writer, in a file with a model's header."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    for value in values:
        sub_type = None if value.item_type is None else gguf.GGUFValueType(value.item_type)
        writer.add_key_value(value.key, value.value, gguf.GGUFValueType(value.type), sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def full() -> Schedule:
    """Every field different from its default, and numbers that a float32 could not hold."""
    rng = np.random.default_rng(5)
    facts = RopeFacts(
        n_rot=32,
        freq_base=10000.0,
        original_context=256,
        native_factors=tuple((1 + rng.random(16)).tolist()),
        native_attention_factor=1.1 + 1e-12,
    )
    found = Provenance(
        method="search",
        onto="native",
        objective="loss on λ ≥ 1, “books”",
        data_digest="sha256:00ff",
        seed=-(2**63),
        losses=(3.5, 1 / 3, 1e-300),
    )
    bands = [
        Band(
            context=256 * (i + 2),
            rescale_factors=tuple((10 ** rng.uniform(-3, 6, 16)).tolist()),
            start_tokens=(4, 7)[i],
            attention_factor=math.pi / 3,
            force_start_tokens=bool(i),
            found=found,
        )
        for i in range(2)
    ]
    far = tuple((10 ** rng.uniform(1, 6, 16)).tolist())
    bands[1] = bands[1].model_copy(update={"near_tokens": 100, "rescale_factors": far, "plain": bands[1]})
    return Schedule(facts=facts, bands=(native_band(facts), *bands))


@pytest.mark.parametrize(
    "schedule",
    [
        full(),
        Schedule(facts=FACTS, bands=(native_band(FACTS),)),
        extend(Schedule(facts=FACTS, bands=(native_band(FACTS),)), 1024),
    ],
    ids=["full", "native", "yarn"],
)
def test_what_is_written_is_read(schedule: Schedule, tmp_path: Path) -> None:
    assert embedded_schedule(read_header(write(tmp_path / "m", schedule_values(schedule)))) == schedule


def test_types_are_those_of_the_format(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(tmp_path / "m", schedule_values(full())))
    kinds = gguf.GGUFValueType
    for key, types in {
        "format_version": [kinds.UINT32],
        "band_count": [kinds.UINT32],
        "facts.native_factors": [kinds.ARRAY, kinds.FLOAT64],
        "band.1.context": [kinds.UINT32],
        "band.1.rescale_factors": [kinds.ARRAY, kinds.FLOAT64],
        "band.1.start_tokens": [kinds.UINT32],
        "band.2.near_tokens": [kinds.UINT32],
        "band.2.plain.rescale_factors": [kinds.ARRAY, kinds.FLOAT64],
        "band.2.plain.found.seed": [kinds.INT64],
        "band.1.attention_factor": [kinds.FLOAT64],
        "band.1.force_start_tokens": [kinds.BOOL],
        "band.1.found.method": [kinds.STRING],
        "band.1.found.seed": [kinds.INT64],
        "band.1.found.losses": [kinds.ARRAY, kinds.FLOAT64],
    }.items():
        assert reader.fields[f"ropewalk.{key}"].types == types
    for key in ("band.0.found.onto", "band.1.plain.context", "band.2.plain.plain.context"):
        assert f"ropewalk.{key}" not in reader.fields


def test_a_file_without_one_has_none(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "m", []))
    assert embedded_schedule(header) is None
    assert schedule_of(header).context == 1024


def changed(**replaced: Any) -> list[Value]:
    """The full schedule's values, some replaced (dots in keys as __), or left out (None)."""
    names = {f"ropewalk.{key.replace('__', '.')}": value for key, value in replaced.items()}
    values = [value for value in schedule_values(full()) if value.key not in names]
    return values + [value._replace(key=key) for key, value in names.items() if value is not None]


def u32(value: int) -> Value:
    return Value("", U32, value)


def f64(value: float) -> Value:
    return Value("", F64, value)


def text(value: str) -> Value:
    return Value("", STRING, value)


def floats(*values: float) -> Value:
    return Value("", ARRAY, list(values), F64)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no version": ({"format_version": None}, "format_version"),
    "newer version": ({"format_version": u32(3)}, "format_version 3 is newer"),
    "version text": ({"format_version": text("1")}, "format_version"),
    "window in version 1": ({"format_version": u32(1)}, "bands.0.near_tokens: not in format_version 1, expected"),
    "window too wide": ({"band__2__near_tokens": u32(257)}, "bands.2.near_tokens: 257, expected at most the original"),
    "plain band without window": ({"band__2__near_tokens": u32(0)}, "plain: there already"),
    "plain band for another context": ({"band__2__plain__context": u32(700)}, "for the same context, 768"),
    "plain band of a plain band": ({"band__2__plain__plain__context": u32(768)}, "no plain band in a plain band"),
    "groups in groups": ({"facts__" + "x__" * 9999: u32(1)}, "groups in groups"),
    "no count": ({"band_count": None}, "ropewalk.band_count: None, expected 1 to 64"),
    "zero count": ({"band_count": u32(0)}, "ropewalk.band_count: 0"),
    "high count": ({"band_count": u32(2**32 - 1)}, "ropewalk.band_count: 4294967295"),
    "count too low": ({"band_count": u32(2)}, "ropewalk.band.2.context: expected bands 0 to 1"),
    "count too high": ({"band_count": u32(4)}, "bands.3.context"),
    "band without a number": ({"band__x__context": u32(3)}, "ropewalk.band.x.context: expected bands"),
    "band that is a value": ({"band__0": u32(3)}, "ropewalk.band.0: expected bands"),
    "value that is a group": ({"facts": text("x"), "facts__n_rot": u32(32)}, "ropewalk.facts"),
    "other key": ({"facts__hue": u32(3)}, "facts.hue"),
    "no facts": ({"facts__n_rot": None}, "facts.n_rot"),
    "odd n_rot": ({"facts__n_rot": u32(33)}, "facts.n_rot"),
    "infinite base": ({"facts__freq_base": f64(math.inf)}, "facts.freq_base"),
    "context 0": ({"band__1__context": u32(0)}, "bands.1.context"),
    "decreasing contexts": ({"band__1__context": u32(100)}, "bands.1.context: 100, expected more than 256"),
    "factor nan": ({"band__1__rescale_factors": floats(*[1.0] * 15, math.nan)}, "bands.1.rescale_factors.15"),
    "factor 0": ({"band__1__rescale_factors": floats(*[1.0] * 15, 0.0)}, "bands.1.rescale_factors.15"),
    "too few factors": ({"band__1__rescale_factors": floats(1.0)}, "bands.1.rescale_factors: 1 numbers"),
    "a number for factors": ({"band__1__rescale_factors": f64(1.0)}, "bands.1.rescale_factors"),
    "start tokens": ({"band__1__start_tokens": u32(5)}, "start_tokens: 5, expected one of"),
    "attention factor": ({"band__1__attention_factor": f64(-1.0)}, "bands.1.attention_factor"),
    "factor 1e-9": ({"band__1__rescale_factors": floats(*[1.0] * 15, 1e-9)}, "bands.1.rescale_factors.15"),
    "attention factor 1e300": ({"band__1__attention_factor": f64(1e300)}, "bands.1.attention_factor"),
    "native attention factor": ({"facts__native_attention_factor": f64(1e-9)}, "facts.native_attention_factor"),
    "losses": (
        {"band__1__found__losses": floats(*[0.0] * 131_073)},
        "found.losses: 131073 items, expected at most 131072",
    ),
    "method": ({"band__1__found__method": u32(5)}, "bands.1.found.method"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    replaced, message = WRONG[case]
    path = write(tmp_path / "m.gguf", changed(**replaced))
    with pytest.raises(UserError) as caught:
        schedule_of(read_header(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_arrays_that_are_far_too_long_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m", changed(band__1__found__losses=floats(*[0.0] * 140_000)))
    with pytest.raises(UserError, match=r"band.1.found.losses: 140000 items, expected at most"):
        schedule_of(read_header(path))


def test_a_schedule_for_another_model_is_refused(tmp_path: Path) -> None:
    for fact, value in (("n_rot", 64), ("freq_base", 5000.0)):
        facts = FACTS.model_copy(update={fact: value})
        path = write(tmp_path / "m", schedule_values(Schedule(facts=facts, bands=(native_band(facts),))))
        with pytest.raises(UserError, match=f"the schedule is for {fact} {value:g}"):
            schedule_of(read_header(path))


def test_a_seed_too_large_for_the_format_is_refused() -> None:
    band = native_band(FACTS).model_copy(update={"found": Provenance(seed=2**63)})
    with pytest.raises(UserError, match=r"ropewalk.band.0.found.seed: \d+, expected"):
        schedule_values(Schedule(facts=FACTS, bands=(band,)))


def test_an_extended_model_says_so_in_both_forms(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    source = tiny_llama(tmp_path / "a.gguf")
    schedule = extend(schedule_of(read_header(source)), 1024)
    embed_schedule(source, tmp_path / "b.gguf", schedule)
    header = read_header(tmp_path / "b.gguf")
    assert schedule_of(header) == schedule
    native = native_schedule(header)
    assert [band.context for band in native.bands] == [256, 1024]
    np.testing.assert_allclose(native.bands[1].rescale_factors, schedule.bands[-1].rescale_factors, rtol=1e-6)
