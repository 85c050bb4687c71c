"""Search for a small set of layers to exclude from INT8."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.workflows.quantize import MAX_PRUNED_LAYERS, min_excluded_layers

LAYERS = [f"layer {number}" for number in range(40)]


def needing(needed, calls):
    """Return a function that is true once all needed layers are excluded, and records its calls."""

    def fits(excluded):
        calls.append(excluded)
        return needed <= excluded

    return fits


@given(st.sets(st.integers(0, len(LAYERS) - 1), min_size=1))
def test_every_needed_layer_is_excluded(indices):
    needed, calls = frozenset(LAYERS[index] for index in indices), []
    found = min_excluded_layers(LAYERS, needing(needed, calls))
    assert needed <= found
    last = max(indices) + 1
    if last <= MAX_PRUNED_LAYERS:
        assert found == needed
    else:
        assert found == frozenset(LAYERS[:last])
    assert len(calls) == len(set(calls))  # each takes minutes
    assert len(calls) <= 2 * 6 + MAX_PRUNED_LAYERS


def test_the_most_sensitive_layer_alone_is_tried_first():
    calls = []
    assert min_excluded_layers(LAYERS, needing(frozenset(LAYERS[:1]), calls)) == frozenset(LAYERS[:1])
    assert calls == [frozenset(LAYERS[:1])]


def test_a_layer_that_was_ranked_too_high_returns_to_int8():
    calls = []
    assert min_excluded_layers(LAYERS, needing(frozenset(LAYERS[2:3]), calls)) == frozenset(LAYERS[2:3])


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_the_result_is_none_if_no_set_fits(count):
    calls = []
    assert min_excluded_layers(LAYERS[:count], needing(frozenset({"another"}), calls)) is None
    assert calls[-1] == frozenset(LAYERS[:count])


def test_the_result_is_none_without_layers():
    assert min_excluded_layers([], needing(frozenset({"another"}), [])) is None
