"""Images: uint8 RGB pixels of the common still formats."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.modalities.base import BadSample, Features, Modality, one_line
from mm.data.streams.shuffle import uniform
from mm.registry import MODALITIES

if TYPE_CHECKING:
    from torch import Tensor

    from mm.batch import Values

# Names of Pillow -> extension. Nothing else is opened.
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
SIDE = 16  # pixels of a judge's features


@MODALITIES.register("image")
class ImageModality(Modality):
    """uint8 (H, W, 3) RGB. Length: pixels.

    EXIF rotation is applied, alpha is laid over white, 16 bit is scaled, of an animation the first
    frame is taken.
    """

    kind: Literal["image"] = "image"
    max_pixels: int = 50_000_000

    order: ClassVar[int] = 10
    extensions: ClassVar[tuple[str, ...]] = ("png", "jpg", "jpeg", "webp", "bmp", "gif")
    value_name: ClassVar[str] = "a uint8 image (H, W, C)"
    unit: ClassVar[str] = "pixels"
    tokens: ClassVar[Mapping[str, int]] = {"image": 2, "pixels": 4}
    shown_as: ClassVar[Literal["text", "image", "audio"]] = "image"
    has_items: ClassVar[bool] = True
    reconstruction: ClassVar[str] = "image"

    def decode(self, data: bytes) -> np.ndarray:
        height, width = _plain_jpeg(data)
        if 0 < height * width <= self.max_pixels:
            pixels = _jpeg(data)
            if pixels is not None and pixels.shape[:2] == (height, width):
                return pixels
        with self._open(data) as (_, image):
            return _pixels(image)

    def length(self, data: bytes) -> int:
        with self._open(data) as (_, image):
            return image.height * image.width

    def check(self, data: bytes) -> tuple[str, int]:
        with self._open(data) as (extension, image):
            height, width, _ = _pixels(image).shape
        return extension, height * width

    @contextmanager
    def _open(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """Yield (extension, Pillow image) with nothing but the header read and checked."""
        import PIL.Image

        with ExitStack() as stack:
            try:
                image = stack.enter_context(
                    PIL.Image.open(io.BytesIO(data), formats=tuple(FORMATS))
                )
                width, height = image.size
                kind = FORMATS[str(image.format)]
            except (
                Exception
            ) as error:  # Pillow raises many types on hostile files: all are "unreadable"
                raise BadSample(f"image: unreadable header ({one_line(error)})") from error
            if width < 1 or height < 1 or width * height > self.max_pixels:
                raise BadSample(
                    f"image: header says {width}x{height} pixels, the cap is {self.max_pixels}"
                )
            yield kind, image

    def owns(self, value: Any) -> bool:
        return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3)

    def accept(self, value: Any) -> np.ndarray:
        """uint8 (H, W, 3), also of (H, W), of (H, W, 1) and of a picture of Pillow."""
        if hasattr(value, "convert") and hasattr(value, "mode"):
            return _pixels(value)
        pixels = np.asarray(value)
        if pixels.dtype == np.uint8 and pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise BadSample(f"image: expected uint8 (H, W, 3), found {pixels.dtype} {pixels.shape}")
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))

    def describe(self, value: np.ndarray) -> str:
        return f"{value.shape[1]}x{value.shape[0]} pixels, mean {np.asarray(value).mean():.0f}"

    def save(self, value: np.ndarray, path: Path) -> None:
        import PIL.Image

        PIL.Image.fromarray(value).save(path)

    def vary(self, data: bytes, key: int) -> bytes:
        """A PNG: moved, turned, scaled a little.

        What has colour is a photograph: moved further, mirrored, which writing may not be, and in
        another light.
        """
        import PIL.Image
        import torch

        raw = self.decode(data)
        photograph = np.ptp(raw, axis=2).max() > 8
        x = torch.from_numpy(raw).permute(2, 0, 1).to(torch.float32).div(255)
        change = VARY_PHOTOGRAPH if photograph else VARY
        moved = affine(x[None], change, np.zeros(1, np.int64), key)[0]
        if photograph:
            moved = relight(moved, key)
        out = io.BytesIO()
        PIL.Image.fromarray(self.from_network(moved, 0, 0)).save(out, "PNG")
        return out.getvalue()

    def n_bytes(self, value: np.ndarray, tokenizer: Any = None) -> int:
        return int(np.asarray(value).size)

    def item(self, value: np.ndarray, config: Any) -> np.ndarray:
        return fit_image(value, config.size, config.gray)

    def stack(
        self, items: Sequence[np.ndarray], counts: np.ndarray, key: int, config: Any
    ) -> Values:
        """(G, C, H, W) float32 in [0, 1]."""
        import torch

        from mm.batch import Values

        images = torch.from_numpy(np.stack(items)).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if config.augment.active:
            images = affine(images, config.augment, counts, key)
        return Values.items(images.contiguous())

    def from_network(self, x: Tensor, length: int, sample_rate: int) -> np.ndarray:
        """(C, H, W) float in [0, 1] -> (H, W, 3) uint8."""
        pixels = x.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
        return pixels.expand(-1, -1, 3).contiguous().numpy()

    def features(self) -> Features:
        return ImageFeatures()


def _plain_jpeg(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG of one or three channels whose header says no more than that.

    (0, 0) of everything else: whatever is unusual, or may ask to be turned, is Pillow's.
    """
    at, none = 2, (0, 0)
    if data[:2] != b"\xff\xd8":
        return none
    while at + 9 < len(data) and data[at] == 0xFF:
        kind, body = data[at + 1], at + 4
        if kind in (0xC0, 0xC1, 0xC2):  # the frame: bits, height, width, channels
            if data[body] != 8 or data[body + 5] not in (1, 3):
                return none
            number = lambda i: int.from_bytes(data[i : i + 2], "big")
            return number(body + 1), number(body + 3)
        picture_of_many = kind == 0xE2 and data[body : body + 3] == b"MPF"
        # Tables, remarks and applications' own, but for APP1, which may hold an orientation.
        if picture_of_many or not (kind in (0xC4, 0xDB, 0xDD, 0xFE, 0xE0) or 0xE2 <= kind <= 0xEF):
            return none
        at = body - 2 + int.from_bytes(data[at + 2 : body], "big")
    return none


def _jpeg(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3): what Pillow gives, in two thirds of its time; None where it cannot."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        pixels = decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
        )
    except RuntimeError:
        return None
    assert isinstance(pixels, torch.Tensor)  # a list is what a list gives
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _pixels(image: Any) -> np.ndarray:
    import PIL.Image
    from PIL import ImageOps

    try:
        image.load()
        turned = image.getexif().get(0x0112, 1) != 1  # else it would only copy
        frame = ImageOps.exif_transpose(image) if turned else image
        if frame.mode.startswith("I") or frame.mode == "F":
            # Pillow's own conversion would clip 16 bit to white.
            wide = np.asarray(frame, dtype=np.float64)
            gray = np.clip(wide / 257.0 + 0.5, 0, 255).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        if frame.mode in ("RGBA", "LA", "PA") or "transparency" in frame.info:
            frame = frame.convert("RGBA")
            below = PIL.Image.new("RGBA", frame.size, (255, 255, 255, 255))
            frame = PIL.Image.alpha_composite(below, frame)
        return np.array(frame if frame.mode == "RGB" else frame.convert("RGB"))
    except Exception as error:
        raise BadSample(f"image: {one_line(error)}") from error


# ---- batches of items


class Augment(Config):
    """Random affine change of images: ranges are symmetric around "unchanged"."""

    shift: Annotated[float, Field(ge=0, le=0.5, description="of the side")] = 0.0
    rotate_deg: Annotated[float, Field(ge=0, le=180, description="degrees")] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1, description="relative")] = 0.0
    flip: Annotated[float, Field(ge=0, le=1, description="probability of a mirror image")] = 0.0

    @property
    def active(self) -> bool:
        return bool(self.shift or self.rotate_deg or self.scale or self.flip)


VARY = Augment(shift=0.08, rotate_deg=6, scale=0.12)
VARY_PHOTOGRAPH = Augment(shift=0.125, rotate_deg=8, scale=0.2, flip=0.5)
LIGHT = 0.3  # how much of its contrast a copy of a photograph may lose or gain


def fit_image(raw: np.ndarray, size: int, gray: bool = False) -> np.ndarray:
    """Resize the short side to ``size`` and keep the middle square.

    ``raw`` uint8 (H, W, 3) -> (size, size, C).
    """
    import PIL.Image

    height, width = raw.shape[:2]
    if (height, width) != (size, size):
        side = min(height, width)  # cropped first: a resampling filter would look past the border
        top, left = (height - side) // 2, (width - side) // 2
        square = PIL.Image.fromarray(raw[top : top + side, left : left + side])
        image = square.resize((size, size), PIL.Image.Resampling.BICUBIC, reducing_gap=3.0)
        raw = np.asarray(image)
    if gray:  # ITU-R 601 luma, as Pillow's "L"
        raw = np.rint(raw @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return np.ascontiguousarray(raw)


def relight(x_CHW: Tensor, key: int) -> Tensor:
    """Another contrast, tint and brightness of a picture in [0, 1]."""
    import torch

    u = torch.from_numpy(uniform(key, np.arange(5), draw=9) * 2 - 1).to(x_CHW.dtype)
    mean = x_CHW.mean((1, 2), keepdim=True)
    tint = 1 + LIGHT / 2 * u[2:, None, None]
    return (x_CHW - mean) * (1 + LIGHT * u[0]) + mean * tint + LIGHT / 4 * u[1]


def affine(images: Tensor, augment: Augment, counts: np.ndarray, key: int) -> Tensor:
    """Shift, turn, scale and mirror a batch.

    (G, C, H, W) float32 -> the same; edges are repeated.
    """
    import torch

    u = np.stack([uniform(key, counts, draw) for draw in range(1, 6)]) * 2 - 1
    angle = np.deg2rad(augment.rotate_deg) * u[0]
    scale = 1 / (1 + augment.scale * u[1])
    mirror = np.where((u[2] + 1) / 2 < augment.flip, -1.0, 1.0)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    theta = np.stack(
        [
            np.stack([cos * mirror, -sin, 2 * augment.shift * u[3]], -1),
            np.stack([sin * mirror, cos, 2 * augment.shift * u[4]], -1),
        ],
        1,
    )
    grid = torch.nn.functional.affine_grid(
        torch.from_numpy(theta).float(), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, "bilinear", "border", align_corners=False)


# ---- judges


class ImageFeatures(Features):
    """Small pixels: of their colours where the values of `fit` have any, else of their light.

    Pixels share one unit; standardising would blow up the noise of the nearly always dark.
    """

    standardise: ClassVar[bool] = False

    def __init__(self) -> None:
        self.color = False

    def fit(self, raws: Sequence[Any]) -> Features:
        self.color = any(raw.ndim == 3 and np.ptp(raw, axis=2).max() > 8 for raw in raws)
        return self

    def __call__(self, raws: Sequence[Any]) -> np.ndarray:
        return image_features(raws, color=self.color)


def image_features(images: Sequence[Any], side: int = SIDE, color: bool = False) -> np.ndarray:
    """Box-downsampled pixels in [0, 1], `(N, side * side)` gray or `(N, side * side * 3)`; float32.

    Args:
        images: uint8 `(H, W, 3)` or `(H, W)`.
    """
    import PIL.Image

    rows = []
    for image in images:
        picture = PIL.Image.fromarray(np.asarray(image)).convert("RGB" if color else "L")
        if picture.size != (side, side):
            picture = picture.resize((side, side), PIL.Image.Resampling.BOX)
        rows.append(np.asarray(picture, np.float32).ravel() / 255)
    return np.stack(rows)
