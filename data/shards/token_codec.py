"""Token members: codes as .npy, int32 of one axis, or values, numbers of more; never pickled.

L places, C features.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np

from mm.data.modalities.base import BadSample
from mm.reading import npy_header
from mm.specs import Encoded

CODES = np.dtype("<i4")
VALUES = (np.dtype("u1"), np.dtype("<f2"), np.dtype("<f4"))  # of continuous modalities
MOST_AXES = 4


class Header(NamedTuple):
    """Start of a token member."""

    offset: int  # of its first number, bytes
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def places(self) -> int:
        """Codes, or vectors of values."""
        return math.prod(self.shape if len(self.shape) == 1 else self.shape[:-1])


def decode_tokens(data: bytes) -> np.ndarray:
    """Decode a token member of codes.

    Returns int32 (L,). Raises BadSample on another type or shape, and on pickles.
    """
    return _array(data, len(data), continuous=False)


def decode_values(data: bytes | np.ndarray, n_features: int) -> np.ndarray:
    """Decode a token member of values.

    Returns (L, C) or a grid of more axes, uint8, float16 or float32. Raises BadSample on another
    type, on other features than ``n_features``, and on pickles.
    """
    found = _array(bytes(data), len(data), continuous=True)
    if found.shape[-1] != n_features:
        raise BadSample(f"values: {found.shape[-1]} features a place, expected {n_features}")
    return found


def _array(data: bytes, size: int, continuous: bool) -> np.ndarray:
    header = tokens_header(data[:256], size)
    if (header.dtype != CODES) != continuous:
        what = "values" if continuous else "codes"
        raise BadSample(f"tokens: expected {what}, found {header.dtype} {header.shape}")
    count = math.prod(header.shape)
    return np.frombuffer(data, header.dtype, count, header.offset).reshape(header.shape)


def tokens_header(head: bytes, size: int) -> Header:
    """Read what stands before the numbers of a member of ``size`` bytes.

    Raises BadSample.
    """
    stream = io.BytesIO(head)
    try:
        shape, fortran, dtype = npy_header(stream)
    except ValueError as error:
        raise BadSample(f"tokens: not an .npy file ({error})") from error
    header = Header(stream.tell(), dtype, shape)
    codes = dtype == CODES and len(shape) == 1
    values = dtype in VALUES and 2 <= len(shape) <= MOST_AXES and shape[-1] > 0
    whole = header.offset + dtype.itemsize * math.prod(shape) == size
    if not (codes or values) or fortran or not whole:
        raise BadSample(
            f"tokens: expected int32 of one axis or values of {MOST_AXES} at most, found {dtype} "
            f"{shape} in {size} bytes"
        )
    return header


def encode_tokens(ids: np.ndarray) -> bytes:
    """Write codes as an .npy member without pickle. ``ids`` (L,) int."""
    return _written(np.ascontiguousarray(ids, dtype=CODES))


def encode_member(code: Encoded) -> tuple[bytes, int]:
    """The .npy member of an item, and its places."""
    if code.values is None:
        return encode_tokens(code.ids), len(code.ids)
    values = np.ascontiguousarray(code.values)
    return _written(values), math.prod(values.shape[:-1])


def _written(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=(1, 0), allow_pickle=False)
    return out.getvalue()
