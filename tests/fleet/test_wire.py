"""What travels: round trips, bounds, no pickle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cluster.fleet import wire
from cluster.fleet.messages import Assignment
from learners.base import Sum

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, max_side=5)
DTYPES = st.sampled_from([np.float32, np.float64])


@given(DTYPES, st.lists(SHAPES, max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_parameters_survive_the_wire_bit_for_bit(dtype, shapes, seed) -> None:
    rng = np.random.default_rng(seed)
    params = {f"p{i}": torch.from_numpy(np.asarray(rng.normal(size=s), dtype)) for i, s in enumerate(shapes)}
    got = wire.received(wire.broadcast(params))
    assert list(got) == list(params)
    for k, v in params.items():
        assert got[k].dtype == v.dtype
        assert torch.equal(got[k], v)


def test_channels_last_weights_travel_in_their_logical_order() -> None:
    w = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    got = wire.received(wire.broadcast({"w": w.contiguous(memory_format=torch.channels_last)}))
    assert torch.equal(got["w"], w)
    assert got["w"].is_contiguous(memory_format=torch.channels_last)


def test_received_tensors_own_their_memory() -> None:
    header, vector = wire.broadcast({"a": torch.zeros(3), "b": torch.zeros(5)})
    vector.flags.writeable = False  # as shared memory is
    got = wire.received((header, vector))
    got["b"] += 1
    assert vector.sum() == 0
    assert all(t.data_ptr() % 64 == 0 for t in got.values())  # alignment may decide the last bits


def test_a_sum_survives_the_wire() -> None:
    a = Assignment(7, 1, "gradient", 3, None, "train", 10, 12, 2)
    result = Sum({"params/w": torch.randn(3, 2)}, 2.0, {"loss": torch.randn(2), "curve": torch.randn(2, 4).double()})
    got = wire.decode_sum(*wire.encode_sum(a, "w1", 0.5, result))
    assert (got.ticket, got.attempt, got.worker, got.weight) == (7, 1, "w1", 2.0)
    assert torch.equal(wire.unflatten(got.layout, got.vector)["params/w"], result.total["params/w"])
    np.testing.assert_array_equal(got.rows["curve"], result.rows["curve"].numpy())
    assert wire.decode_assignment(wire.encode_assignment(a)) == a


def test_mixed_dtypes_in_one_message_are_refused() -> None:
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32, torch.float64"):
        wire.flatten({"a": torch.zeros(1), "b": torch.zeros(1).double()})


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ({"dtype": "|O", "shape": [1], "data": b"12345678"}, "dtype"),
        ({"dtype": "<f8", "shape": [2], "data": b"12345678"}, "8 bytes"),
        ({"dtype": "<f8", "shape": [1 << 60], "data": b""}, "0 bytes"),
    ],
)
def test_arrays_that_do_not_add_up_are_refused_before_allocation(packed, message) -> None:
    with pytest.raises(ValueError, match=message):
        wire.unpack_array(packed)


def test_what_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="dtype bool was to be written, wanted one of <f4"):
        wire.pack_array(np.zeros(2, bool))


def test_a_vector_that_does_not_fit_its_layout_is_refused() -> None:
    header, vector = wire.broadcast({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="a vector of 2 numbers does not fit a layout of 3"):
        wire.received((header, vector[:2]))


@pytest.mark.parametrize(("values", "finite"), [
    ([], True), ([1.0, -2.0], True), ([3e38, 3e38], True), ([1.0, np.nan], False), ([np.inf, -np.inf], False),
    ([3e38, -np.inf], False),
])  # fmt: skip
def test_large_numbers_are_finite_though_their_sum_is_not(values: list[float], finite: bool) -> None:
    assert wire.is_finite(np.array(values, np.float32)) is finite
