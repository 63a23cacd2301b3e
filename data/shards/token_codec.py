"""Token members: codes as .npy, int32 of one axis, never pickled."""

from __future__ import annotations

import io

import numpy as np

from mm.data.modalities.base import BadSample, one_line


def decode_tokens(data: bytes) -> np.ndarray:
    """Decode a token member.

    Returns int32 (L,). Raises BadSample on another type or shape, and on pickles.
    """
    offset, count = tokens_header(data[:256], len(data))
    return np.frombuffer(data, "<i4", count, offset)


def tokens_header(head: bytes, size: int) -> tuple[int, int]:
    """Read (byte offset of the codes, number of codes) from the start of an .npy member.

    Raises BadSample.
    """
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:
        raise BadSample(f"tokens: not an .npy file ({one_line(error)})") from error
    if (
        dtype != np.dtype("<i4")
        or len(shape) != 1
        or fortran
        or stream.tell() + 4 * shape[0] != size
    ):
        raise BadSample(f"tokens: expected int32 of one axis, found {dtype} {shape}")
    return stream.tell(), shape[0]


def encode_tokens(ids: np.ndarray) -> bytes:
    """Write codes as an .npy member without pickle. ``ids`` (L,) int."""
    out = io.BytesIO()
    np.lib.format.write_array(
        out, np.ascontiguousarray(ids, dtype="<i4"), version=(1, 0), allow_pickle=False
    )
    return out.getvalue()
