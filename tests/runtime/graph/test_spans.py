"""Which keys may be rotated to another band, and which are read again."""

from ropewalk.factors import Band
from ropewalk.runtime.graph.spans import MOST_ROTATIONS, Span, add_span, read_before, rotatable, rotated

SHORT, LONG = (Band(context=context, rescale_factors=(1.0,)) for context in (100, 200))


def test_spans_follow_what_is_read_and_rolled_back():
    spans = add_span((), 0, SHORT)
    spans = add_span(spans, 50, SHORT)
    assert spans == (Span(0, SHORT),)
    spans = add_span(rotated(spans, 1), 90, LONG)
    assert spans == (Span(0, SHORT, 1), Span(90, LONG))
    assert add_span(spans, 60, LONG) == (Span(0, SHORT, 1), Span(60, LONG))
    assert add_span(spans, 0, SHORT) == (Span(0, SHORT),)
    assert add_span((Span(0, SHORT, 2),), 60, SHORT) == (Span(0, SHORT, 2), Span(60, SHORT))


def test_keys_rotated_too_often_are_read_again():
    most = MOST_ROTATIONS["q4_0"]
    worn = (Span(0, SHORT, most - 1), Span(40, SHORT, most), Span(80, SHORT, 0))
    assert rotatable(worn, 90, "q4_0") == 40
    assert rotatable(worn, 30, "q4_0") == 30
    assert rotatable(worn, 90, "f16") == 90
    assert rotatable((), 90, "q4_0") == 90


def test_what_was_read_in_a_longer_band_is_read_again_on_the_way_back():
    spans = (Span(0, SHORT, 1), Span(90, LONG))
    assert read_before(spans, 95, [LONG]) == 90
    assert read_before(spans, 60, [LONG]) == 60
    assert read_before((), 60, [LONG]) == 60
