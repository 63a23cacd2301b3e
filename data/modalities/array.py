"""Arrays of floats of any rank, such as depths, meshes and measurements: NumPy's .npy files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mm.data.modalities.base import BadSample, Features, Modality, Shown
from mm.data.modalities.heat_map import heat_map
from mm.errors import UserError
from mm.reading import npy_header
from mm.registry import MODALITIES
from mm.specs import FloatArray

NUMBERS = "fiub"  # kinds of dtypes that are read: floats, integers, truth values


@MODALITIES.register("array")
class ArrayModality(Modality):
    """`FloatArray`: float32 of one axis or more, of an .npy of any float, integer or truth values.

    Python objects are never opened; complex numbers are given as two channels. Length: elements.
    """

    kind: Literal["array"] = "array"
    max_elements: Annotated[int, Field(gt=0, description="a larger array is no sample")] = (
        50_000_000
    )
    max_axes: Annotated[int, Field(gt=0, le=32, description="of an array")] = 8

    order: ClassVar[int] = 26
    extensions: ClassVar[tuple[str, ...]] = ("npy",)
    value_name: ClassVar[str] = "a FloatArray"
    unit: ClassVar[str] = "elements"
    tokens: ClassVar[Mapping[str, int]] = {"array": 5}

    def decode(self, data: bytes) -> FloatArray:
        shape, order, dtype, offset = self._header(data)
        array = np.frombuffer(data, dtype, math.prod(shape), offset)
        return self._checked(array.reshape(shape, order=order))

    def length(self, data: bytes) -> int:
        return math.prod(self._header(data)[0])

    def _header(self, data: bytes) -> tuple[tuple[int, ...], Literal["C", "F"], Any, int]:
        """Shape, order, dtype and offset of the numbers, whose bytes are all there."""
        file = io.BytesIO(data)
        try:
            shape, fortran, dtype = npy_header(file)
        except ValueError as error:
            raise BadSample(f"array: not an .npy file ({error})") from error
        self._require(shape, dtype)
        promised, found = dtype.itemsize * math.prod(shape), len(data) - file.tell()
        if promised != found:
            raise BadSample(
                f"array: header says {dtype} {shape}, {promised} bytes; there are {found}"
            )
        return shape, "F" if fortran else "C", dtype, file.tell()

    def _require(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise BadSample on other than numbers, on no element, and on too many."""
        if dtype.kind not in NUMBERS:
            raise BadSample(f"array: {dtype}, not real numbers")
        if not shape or 0 in shape:
            raise BadSample(f"array: shape {shape} has no {'element' if shape else 'axis'}")
        if len(shape) > self.max_axes or math.prod(shape) > self.max_elements:
            raise BadSample(
                f"array: shape {shape}; the caps are max_axes {self.max_axes} and max_elements "
                f"{self.max_elements}"
            )

    def _checked(self, array: np.ndarray) -> FloatArray:
        with np.errstate(over="ignore"):
            values = np.array(array, np.float32, order="C")
        if not np.isfinite(values).all():
            first = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
            raise BadSample(f"array: element {first} is {array[first]}: not finite in float32")
        return FloatArray(values)

    def owns(self, value: Any) -> bool:
        return isinstance(value, FloatArray)

    def accept(self, value: Any) -> FloatArray:
        """A `FloatArray`, also of any array or nested list of numbers."""
        try:
            array = np.asarray(value.values if isinstance(value, FloatArray) else value)
        except (TypeError, ValueError) as error:
            raise BadSample("array: expected numbers of one shape") from error
        self._require(array.shape, array.dtype)
        return self._checked(array)

    def describe(self, value: FloatArray) -> str:
        x = value.values
        shape = "x".join(map(str, x.shape))
        return f"{shape} from {x.min():.4g} to {x.max():.4g}, mean {x.mean(dtype=np.float64):.4g}"

    def save(self, value: FloatArray, path: Path) -> None:
        with path.open("wb") as file:
            np.lib.format.write_array(file, value.values, version=(1, 0), allow_pickle=False)

    def n_bytes(self, value: FloatArray, tokenizer: Any = None) -> int:
        return int(value.values.nbytes)

    def show(self, data: bytes) -> Shown:
        """A heat map of two axes, a line about others."""
        value = self.decode(data)
        if value.values.ndim != 2:
            return Shown("text", self.describe(value))
        return Shown("image", heat_map(value.values), "png")

    def features(self) -> Features:
        return ArrayFeatures()


class ArrayFeatures(Features):
    """The elements themselves, of arrays of one shape."""

    shape: tuple[int, ...] | None = None

    def __call__(self, raws: Sequence[FloatArray]) -> np.ndarray:
        """Raises UserError on an array of another shape than the first ever seen."""
        for raw in raws:
            self.shape = self.shape or raw.values.shape
            if raw.values.shape != self.shape:
                raise UserError(
                    f"a judge of arrays needs one shape: {self.shape} and {raw.values.shape}"
                )
        return np.stack([raw.values.ravel() for raw in raws])
