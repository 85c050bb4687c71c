"""As few spared layers as a measure allows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.workflows.quantize import MAX_PRUNED_LAYERS, min_excluded_layers

LAYERS = [f"layer {number}" for number in range(40)]


def needing(needed, calls):
    """Fits once all of these are spared; remembers what was asked."""

    def fits(spared):
        calls.append(spared)
        return needed <= spared

    return fits


@given(st.sets(st.integers(0, len(LAYERS) - 1), min_size=1))
def test_what_must_be_spared_is(places):
    needed, calls = frozenset(LAYERS[place] for place in places), []
    found = min_excluded_layers(LAYERS, needing(needed, calls))
    assert needed <= found
    last = max(places) + 1
    if last <= MAX_PRUNED_LAYERS:
        assert found == needed
    else:
        assert found == frozenset(LAYERS[:last])
    assert len(calls) == len(set(calls))  # each costs minutes
    assert len(calls) <= 2 * 6 + MAX_PRUNED_LAYERS


def test_the_dearest_layer_alone_is_tried_first():
    calls = []
    assert min_excluded_layers(LAYERS, needing(frozenset(LAYERS[:1]), calls)) == frozenset(LAYERS[:1])
    assert calls == [frozenset(LAYERS[:1])]


def test_a_layer_that_was_ranked_too_high_goes_back_to_int8():
    calls = []
    assert min_excluded_layers(LAYERS, needing(frozenset(LAYERS[2:3]), calls)) == frozenset(LAYERS[2:3])


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_nothing_is_found_where_nothing_helps(count):
    calls = []
    assert min_excluded_layers(LAYERS[:count], needing(frozenset({"another"}), calls)) is None
    assert calls[-1] == frozenset(LAYERS[:count])


def test_without_layers_nothing_is_found():
    assert min_excluded_layers([], needing(frozenset({"another"}), [])) is None
