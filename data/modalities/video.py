"""Video: uint8 RGB frames at a constant rate, decoded through PyAV. Sound is left out."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mm.data.modalities.base import BadSample, Modality, Shown, one_line
from mm.errors import UserError
from mm.registry import MODALITIES
from mm.specs import Video

if TYPE_CHECKING:
    from types import ModuleType

# Demuxers that may look at a file. A playlist, which makes others open further files and addresses,
# is none of them.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
ENDINGS = {"mov": "mp4", "matroska": "mkv", "avi": "avi"}  # by the first name of a demuxer


@MODALITIES.register("video")
class VideoModality(Modality):
    """`Video`: frames scaled to ``max_side`` at most, at the file's rate or ``max_rate``.

    A file of varying rate is brought to its mean one: of each moment the first frame that is not
    before it. Length: frames of the file.
    """

    kind: Literal["video"] = "video"
    max_seconds: Annotated[float, Field(gt=0, description="a longer file is no sample")] = 600.0
    max_side: Annotated[int, Field(gt=0, description="pixels; larger frames are scaled down")] = 512
    max_rate: Annotated[float, Field(gt=0, description="frames a second; more are left out")] = 30.0
    max_pixels: Annotated[
        int, Field(gt=0, description="of all frames together, as they are kept in memory")
    ] = 400_000_000

    order: ClassVar[int] = 22
    extensions: ClassVar[tuple[str, ...]] = ("mp4", "mkv", "webm", "mov", "avi")
    value_name: ClassVar[str] = "a Video"
    unit: ClassVar[str] = "frames"
    tokens: ClassVar[Mapping[str, int]] = {"video": 7}

    def decode(self, data: bytes) -> Video:
        with self._open(data) as (_, stream, container):
            rate = min(float(stream.average_rate), self.max_rate)
            height, width = self._size(stream)
            kept: list[np.ndarray] = []
            first: float | None = None
            most = min(self.max_pixels // (height * width), int(self.max_seconds * rate) + 1)
            try:
                for frame in container.decode(stream):
                    at = float(frame.time or 0.0)
                    first = at if first is None else first
                    # half a frame of room: times are rounded to the container's clock
                    due = int((at - first) * rate + 0.5) + 1 - len(kept)
                    if due <= 0:
                        continue
                    if len(kept) + due > most:
                        raise BadSample(
                            f"video: more than {most} frames of {width}x{height} at {rate:g} a "
                            f"second; the caps are max_pixels {self.max_pixels} and max_seconds "
                            f"{self.max_seconds:g}"
                        )
                    pixels = frame.to_ndarray(width=width, height=height, format="rgb24")
                    kept += [pixels] * due
            except BadSample:
                raise
            except Exception as error:  # FFmpeg's own, and what a damaged stream makes of arrays
                raise BadSample(f"video: {one_line(error)}") from error
        if not kept:
            raise BadSample("video: no frames")
        return Video(np.stack(kept), rate)

    def length(self, data: bytes) -> int:
        with self._open(data) as (_, stream, _):
            promised = _promised(stream)
        return promised or len(self.decode(data).frames)

    def check(self, data: bytes) -> tuple[str, int]:
        with self._open(data) as (extension, stream, _):
            promised = _promised(stream)
        frames = len(self.decode(data).frames)
        return extension, promised or frames

    def check_whole(self, data: bytes) -> None:
        with self._open(data) as (_, stream, container):
            promised = _seconds(stream, container)
        found = self.decode(data)
        seconds = len(found.frames) / found.rate
        if seconds < 0.9 * promised - 2 / found.rate:
            raise BadSample(
                f"video: cut short: the header promises {promised:.1f} s, there are {seconds:.1f} s"
            )

    @contextmanager
    def _open(self, data: bytes) -> Iterator[tuple[str, Any, Any]]:
        """Yield (extension, video stream, container) with the headers read and checked."""
        av = _library()
        with ExitStack() as stack:
            try:
                options = {"format_whitelist": DEMUXERS, "protocol_whitelist": ""}
                container = stack.enter_context(av.open(io.BytesIO(data), options=options))
                streams = container.streams.video
                kind = ENDINGS.get(container.format.name.split(",")[0], "")
                if kind == "mkv" and b"webm" in data[:64]:
                    kind = "webm"
                stream: Any = streams[0] if streams else None
                shape = (stream.height, stream.width) if stream else (0, 0)
                rate = float(stream.average_rate or 0) if stream else 0.0
                seconds = _seconds(stream, container) if stream else 0.0
            except Exception as error:  # FFmpeg has an error of its own for each fault
                raise BadSample(f"video: unreadable header ({one_line(error)})") from error
            if stream is None or not kind:
                raise BadSample("video: no stream of moving pictures in it")
            if not (0 < min(shape) and max(shape) <= 2**14 and 0 < rate <= 1000):
                raise BadSample(
                    f"video: header says {shape[1]}x{shape[0]} pixels, {rate:g} frames a second"
                )
            if seconds > self.max_seconds:
                raise BadSample(
                    f"video: header says {seconds:.0f} s, the cap is {self.max_seconds:g} s"
                )
            stream.thread_type = "SLICE"  # the same frames on any machine, no thread a frame
            yield kind, stream, container

    def _size(self, stream: Any) -> tuple[int, int]:
        """Height and width that frames are scaled to."""
        scale = min(1.0, self.max_side / max(stream.height, stream.width))
        return max(1, round(stream.height * scale)), max(1, round(stream.width * scale))

    def owns(self, value: Any) -> bool:
        return isinstance(value, Video)

    def accept(self, value: Any) -> Video:
        """A `Video`, also of a pair (frames (F, H, W, 3) uint8, frames a second)."""
        if not isinstance(value, Video):
            if not (isinstance(value, (tuple, list)) and len(value) == 2):
                raise BadSample("video: give a file, a Video, or (frames, frames a second)")
            value = Video(*value)
        frames, rate = np.asarray(value.frames), float(value.rate)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise BadSample(
                f"video: expected uint8 (F, H, W, 3), found {frames.dtype} {frames.shape}"
            )
        if not 0 < rate < 1e4:
            raise BadSample(f"video: {rate} frames a second")
        return Video(np.ascontiguousarray(frames), rate)

    def describe(self, value: Video) -> str:
        n, height, width = value.frames.shape[:3]
        return f"{n} frames of {width}x{height} pixels, {value.rate:g} a second"

    def show(self, data: bytes) -> Shown:
        return Shown("text", self.describe(self.decode(data)))

    def n_bytes(self, value: Video, tokenizer: Any = None) -> int:
        return int(value.frames.size)

    def save(self, value: Video, path: Path) -> None:
        """H.264 in MP4, or VP9 in WebM; sides that are odd get a line more."""
        av = _library()
        _, height, width = value.frames.shape[:3]
        frames = np.pad(
            value.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge"
        )
        webm = path.suffix == ".webm"
        with av.open(str(path), "w") as container:
            rate = Fraction(value.rate).limit_denominator(1001)
            stream: Any = container.add_stream("libvpx-vp9" if webm else "libx264", rate=rate)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "18"}
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def _seconds(stream: Any, container: Any) -> float:
    """Seconds that the header promises, of the stream or of the whole file; 0 where it does not."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6


def _promised(stream: Any) -> int:
    """Frames that the header promises; 0 where it says nothing."""
    if stream.frames:
        return int(stream.frames)
    seconds = float(stream.duration or 0) * float(stream.time_base or 0)
    return int(seconds * float(stream.average_rate) + 0.5)


def _library() -> ModuleType:
    """PyAV. Raises UserError without it."""
    try:
        import av
        import av.logging
    except ModuleNotFoundError as error:
        raise UserError(
            f"video needs the package '{error.name}': pip install 'mm-stack[video]'"
        ) from error
    return av
