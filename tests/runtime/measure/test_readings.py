"""The band that a method reads in."""

import pytest
from ropewalk import UserError
from ropewalk.factors import Band, RopeFacts, Schedule
from ropewalk.runtime.measure.readings import band_by_method

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
