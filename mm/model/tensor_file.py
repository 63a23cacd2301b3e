"""safetensors written tensor by tensor and hashed on the way: one piece is in memory at a time.

Source of the format: 8 bytes of the header's length, the header (JSON), the values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.errors import UserError
from mm.hashes import ALGORITHM

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE = 2**22  # values that are on the host at once, of a tensor that is elsewhere


class Planned(NamedTuple):
    """A tensor to write, made when its turn has come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_file(
    path: Path, plan: Sequence[Planned], metadata: Mapping[str, str], sync: bool = False
) -> str:
    """Write one safetensors file, tensor by tensor, and return its SHA-256.

    Args:
        sync: whether it must be on the disk when this returns.
    Raises:
        UserError: a tensor has another shape than was planned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in plan:
        offsets = [at, at := at + tensor.n_bytes]
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = hashlib.new(ALGORITHM)
    with path.open("wb", buffering=0) as out:

        def put(data: bytes | memoryview) -> None:
            found.update(data)
            left = memoryview(data)
            while left:
                left = left[out.write(left) :]

        def put_values(tensor: Planned) -> None:  # of its own: nothing of it is left for the next
            made = tensor.make()
            if tuple(made.shape) != tensor.shape:
                raise UserError(
                    f"{tensor.name}: {list(made.shape)} where the config asks for "
                    f"{list(tensor.shape)}: config and weights are of different models"
                )
            flat = made.detach().reshape(-1)
            for start in range(0, flat.numel(), PIECE):
                piece = flat[start : start + PIECE].to(tensor.dtype).cpu().contiguous()
                put(piece.view(torch.uint8).numpy().data)

        put(len(text).to_bytes(8, "little") + text)
        for tensor in plan:
            put_values(tensor)
        if sync:
            os.fsync(out.fileno())
    return found.hexdigest()
