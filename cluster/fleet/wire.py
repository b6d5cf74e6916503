"""How parameters and sums travel: a msgpack header and one flat vector. Typed, bounded, no pickle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeAlias

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cluster.fleet.messages import Assignment, Broadcast, Contribution, Elsewhere, Layout, Vector
from learners.base import Params, Sum
from learners.engine.memory import channels_last

LARGEST_HEADER = 64 << 20  # bytes
Natural: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
DTYPES = ("<f4", "<f8", "<i8")
Compression: TypeAlias = Literal["none", "bfloat16"]


class Packed(TypedDict):
    """An array as plain msgpack values."""

    dtype: str
    shape: list[Natural]
    data: bytes


class _Header(TypedDict):
    ticket: Natural
    attempt: Natural
    worker: str
    seconds: float
    weight: float
    layout: list[tuple[str, list[Natural]]]
    rows: dict[str, Packed]
    finite: bool
    culprit: str


_ASSIGNMENT = TypeAdapter(Assignment)
_HEADER = TypeAdapter(_Header)
_LAYOUT = TypeAdapter(list[tuple[str, list[Natural]]])


def flatten(params: Params) -> tuple[Layout, Vector]:
    """Names with shapes, and all entries as one vector in that order. All tensors must have one dtype."""
    layout = tuple((name, tuple(value.shape)) for name, value in params.items())
    dtypes = {value.dtype for value in params.values()}
    if len(dtypes) > 1:
        raise TypeError(f"tensors of one message must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    if not params:
        return layout, np.zeros(0, np.float32)
    # reshape, not view: channels-last weights travel in their logical order.
    vector = torch.cat([value.detach().reshape(-1) for value in params.values()])
    return layout, vector.cpu().numpy()


def unflatten(layout: Layout, vector: Vector, device: str = "cpu") -> Params:
    """Inverse of `flatten`. Every tensor has memory of its own: the vector may be a read-only view of shared memory."""
    check_size(layout, vector)
    params: Params = {}
    position = 0
    for name, shape in layout:
        size = math.prod(shape)
        part = owned(vector[position : position + size].reshape(shape))
        params[name] = channels_last(part.to(device))
        position += size
    return params


def size(layout: Layout) -> int:
    """Numbers that a layout has room for."""
    return sum(math.prod(shape) for _, shape in layout)


def check_size(layout: Layout, vector: Vector) -> None:
    """Raise ValueError where a vector does not fit its layout."""
    if vector.size != size(layout):
        raise ValueError(f"a vector of {vector.size} numbers does not fit a layout of {size(layout)}")


def is_finite(vector: Vector) -> bool:
    """Whether every number is finite."""
    # A sum is one pass without temporaries; only where it is not finite does the slow test decide.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(vector.sum()) or np.isfinite(vector).all())


def owned(array: NDArray[Any]) -> torch.Tensor:
    """A copy of `array` in torch's own memory, which is aligned to 64 bytes.

    NumPy's is to 16, by chance to more; and alignment may decide which kernel a library picks, hence the last bits.
    """
    copy = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype)
    np.copyto(copy.numpy(), array)
    return copy


def broadcast(params: Params) -> Broadcast:
    """What a pool publishes for `params`."""
    layout, vector = flatten(params)
    return encode(layout), vector


def received(message: Broadcast, device: str = "cpu") -> Params:
    """The parameters of a broadcast."""
    header, vector = message
    return unflatten(_layout(_LAYOUT.validate_python(decode(header))), vector, device)


def encode_assignment(assignment: Assignment) -> bytes:
    """An assignment as msgpack."""
    return encode(asdict(assignment))


def decode_assignment(message: bytes) -> Assignment:
    """Inverse of `encode_assignment`. Raises ValueError for anything else."""
    return _ASSIGNMENT.validate_python(decode(message))


def compressed(vector: Vector) -> NDArray[np.uint16]:
    """Rounded to bfloat16 (nearest, ties to even), as its bits."""
    bits: NDArray[np.uint16] = torch.from_numpy(vector).to(torch.bfloat16).view(torch.uint16).numpy()
    return bits


def restored(vector: NDArray[Any]) -> Vector:
    """The numbers of a vector as it travelled."""
    if vector.dtype != np.uint16:
        return vector
    return (vector.astype(np.uint32) << 16).view(np.float32)


def encode_sum(
    assignment: Assignment, worker: str, seconds: float, result: Sum, compression: Compression = "none",
    blame: Callable[[], str] = str,
) -> tuple[bytes, NDArray[Any]]:  # fmt: skip
    """A worker's answer. `compression` is of the total; what is kept per task travels as it is. `blame` is asked for
    words where a number of the total is not finite.
    """
    layout, vector = flatten(result.total)
    finite = is_finite(vector)
    rows = {name: pack_array(np.ascontiguousarray(value.detach().cpu().numpy())) for name, value in result.rows.items()}
    header = {
        "ticket": assignment.ticket,
        "attempt": assignment.attempt,
        "worker": worker,
        "seconds": seconds,
        "weight": result.weight,
        "layout": layout,
        "rows": rows,
        "finite": finite,
        "culprit": "" if finite else blame(),
    }
    return encode(header), compressed(vector) if compression == "bfloat16" else vector


def decode_sum(header: bytes, vector: NDArray[Any] | Elsewhere) -> Contribution:
    """Inverse of `encode_sum`. Raises ValueError for anything else."""
    f = _HEADER.validate_python(decode(header))
    layout = _layout(f["layout"])
    if isinstance(vector, np.ndarray):
        vector = restored(vector)
        check_size(layout, vector)
    rows = {name: unpack_array(value) for name, value in f["rows"].items()}
    return Contribution(
        f["ticket"], f["attempt"], f["worker"], f["seconds"], f["weight"], layout, vector, rows, f["finite"],
        f["culprit"],
    )  # fmt: skip


def encode(value: object) -> bytes:
    """msgpack."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def decode(message: bytes) -> Any:
    """msgpack, refusing oversized messages before anything is allocated. Raises ValueError."""
    if len(message) > LARGEST_HEADER:
        raise ValueError(f"a message header of {len(message)} bytes exceeds {LARGEST_HEADER}")
    return msgpack.unpackb(message, raw=False, strict_map_key=True)


def pack_array(array: NDArray[Any]) -> Packed:
    """An array as plain msgpack values. Raises ValueError for a dtype that `unpack_array` would refuse."""
    if array.dtype.str not in DTYPES:
        raise ValueError(f"an array of dtype {array.dtype} was to be written, wanted one of {', '.join(DTYPES)}")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}


def unpack_array(packed: Packed) -> NDArray[Any]:
    """Inverse of `pack_array`; only numbers of known dtypes, only as many as the shape says."""
    dtype, shape, data = packed["dtype"], tuple(packed["shape"]), packed["data"]
    if dtype not in DTYPES:
        raise ValueError(f"an array of dtype {dtype!r} arrived, wanted one of {', '.join(DTYPES)}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and dtype {dtype} arrived with {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _layout(value: list[tuple[str, list[int]]]) -> Layout:
    return tuple((name, tuple(shape)) for name, shape in value)
