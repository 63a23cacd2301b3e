"""Video: what is decoded against what was drawn, hostile files, tubes, packing, reading."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from chat_toys import bpe, jsonl, learnt

from mm.data.chat.loss import sample_segments
from mm.data.chat.show import inspect_loss
from mm.data.modalities.base import BadSample, get_modality
from mm.data.modalities.video import VideoModality
from mm.data.pack.config import PackConfig
from mm.data.pack.job import PackJob, pack
from mm.data.pack.preview import preview
from mm.data.shards.reader import ShardSet
from mm.errors import UserError
from mm.specs import Video
from mm.tokenizers.text.bytes import BytesConfig
from mm.tokenizers.video.tubes import VideoTubesConfig
from mm.vocabulary import Vocabulary


def moving(n: int = 20, rate: float = 10.0, height: int = 32, width: int = 48) -> Video:
    """A bright bar that goes to the right, two pixels a frame."""
    frames = np.zeros((n, height, width, 3), np.uint8)
    for i in range(n):
        frames[i, :, 2 * i : 2 * i + 8] = (255, 160, 0)
    return Video(frames, rate)


def file(video: Video | None = None, ending: str = "mp4", root: Path | None = None) -> bytes:
    m = get_modality("video")
    if root is None:
        return m.file_of(video or moving())
    m.save(video or moving(), root / f"x.{ending}")
    return (root / f"x.{ending}").read_bytes()


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "mov"])
def test_what_was_drawn_is_seen(ending: str, tmp_path: Path) -> None:
    m, drawn = get_modality("video"), moving()
    data = file(drawn, ending, tmp_path)
    seen = m.decode(data)
    assert seen.frames.shape == drawn.frames.shape and seen.rate == 10
    assert np.abs(seen.frames.astype(int) - drawn.frames).mean() < 4, "but for compression"
    for i in (0, 7, 19):  # where the bar is, so that no frame took another's place
        bright = np.flatnonzero(seen.frames[i, 16, :, 0] > 128)
        assert abs(bright[0] - 2 * i) <= 1 and abs(bright[-1] - min(47, 2 * i + 7)) <= 1
    assert m.check(data)[0] == ("mp4" if ending == "mov" else ending) and m.length(data) == 20
    m.check_whole(data)


def test_frames_of_a_varying_rate_keep_their_time() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for at in (0, 1, 2, 3, 10, 11, 12, 13):  # tenths of a second
            pixels = np.full((32, 32, 3), 18 * at, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = at, stream.time_base or 1 / stream.codec_context.rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    seen = get_modality("video", {"max_rate": 5.0}).decode(out.getvalue())
    light = seen.frames[:, 16, 16, 0].astype(int)
    assert (np.diff(light) >= -2).all() and seen.rate <= 10
    seconds = len(seen.frames) / seen.rate
    assert 1.0 < seconds < 1.8, "as long as its times say"


def test_large_and_fast_files_are_brought_down_and_long_ones_refused() -> None:
    data = file(moving(30, 30.0, 64, 128))
    small = get_modality("video", {"max_side": 32, "max_rate": 10.0}).decode(data)
    assert small.frames.shape[1:3] == (16, 32) and small.rate == 10
    assert abs(len(small.frames) - 10) <= 1
    with pytest.raises(BadSample, match=r"video: header says 1 s, the cap is 0.5 s"):
        get_modality("video", {"max_seconds": 0.5}).decode(data)
    with pytest.raises(BadSample, match=r"video: more than 2 frames of 128x64 .* max_pixels 20000"):
        get_modality("video", {"max_pixels": 20000}).decode(data)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    """FFmpeg would read what a playlist names: files of this machine, and addresses."""
    part = tmp_path / "part.ts"
    with av.open(str(part), "w", format="mpegts") as container:
        stream: Any = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{part}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile '{part}'\n".encode()
    for data in (playlist, concat, part.read_bytes()):
        with pytest.raises(BadSample, match="^video: "):
            get_modality("video").decode(data)


def test_damaged_files_are_bad_samples_and_nothing_else() -> None:
    m, data = get_modality("video"), bytearray(file())
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(120):
        hurt = bytearray(data)
        if i % 3 == 0:
            hurt = hurt[: int(rng.integers(1, len(hurt)))]
        for at in rng.integers(0, len(hurt), int(rng.integers(1, 12))):
            hurt[at] = int(rng.integers(256))
        try:
            m.check(bytes(hurt))
            m.check_whole(bytes(hurt))
        except BadSample as error:
            refused += 1
            assert str(error).startswith("video: ") and "\n" not in str(error)
    assert refused > 30


def test_a_file_that_is_cut_short_is_refused_by_packing(tmp_path: Path) -> None:
    data = file(moving(200, 20.0), "mkv", tmp_path)
    with pytest.raises(BadSample, match="video: cut short: the header promises 10.0 s"):
        get_modality("video").check_whole(data[: len(data) // 2])


def test_what_python_has_is_accepted_or_told() -> None:
    m = VideoModality()
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    assert m.accept((frames, 5)).rate == 5 and m.owns(m.accept((frames, 5)))
    for bad in (frames, (frames[0], 5), (frames.astype(float), 5), (frames, 0)):
        with pytest.raises(BadSample, match="^video: "):
            m.accept(bad)


def test_tubes_by_hand() -> None:
    video = Video(np.arange(4 * 4 * 8 * 3, dtype=np.uint8).reshape(4, 4, 8, 3), 2.0)
    tubes = VideoTubesConfig(fps=2.0, frames=2, patch=4, size=8).build()
    values = tubes.encode([video])[0].values
    assert values.shape == (2, 1, 2, 2 * 4 * 4 * 3)
    assert np.array_equal(values[1, 0, 1].reshape(2, 4, 4, 3), video.frames[2:4, :, 4:])
    again = tubes.decode(tubes.encode([video]))[0]
    assert np.array_equal(again.frames, video.frames) and again.rate == 2


def test_tubes_follow_the_seconds_not_the_frames() -> None:
    """The same motion at two rates gives the same moments; a long one is thinned out evenly."""
    slow, fast = moving(10, 5.0), Video(np.repeat(moving(10, 5.0).frames, 4, axis=0), 20.0)
    tubes = VideoTubesConfig(fps=5.0, frames=2, patch=16, size=48).build()
    one, other = (e.values for e in tubes.encode([slow, fast]))
    assert one.shape == other.shape == (5, 2, 3, 1536)
    assert (one != other).mean() < 0.05, "a moment between two frames may be either"
    few = VideoTubesConfig(fps=5.0, frames=2, patch=16, size=48, max_tubes=12).build()
    values = few.encode([slow])[0].values
    assert values.shape[0] == 2
    seen = few.decode([few.encode([slow])[0]])[0].frames[:, 16, :, 0]
    assert np.argmax(seen[-1] > 128) >= 14, "the last moments are seen, too"
    odd = tubes.encode([Video(slow.frames[:3], 5.0)])[0].values
    assert np.array_equal(
        odd[1].reshape(2, 3, 2, -1)[:, :, 0], odd[1].reshape(2, 3, 2, -1)[:, :, 1]
    )
    with pytest.raises(UserError, match="expected a Video, got ndarray"):
        tubes.encode([slow.frames])


def test_packed_with_captions_and_stands_on_four_axes(tmp_path: Path) -> None:
    source = tmp_path / "source" / "train"
    source.mkdir(parents=True)
    for i in range(6):
        (source / f"{i}.mp4").write_bytes(file(moving(8 + 4 * (i % 2))))
        (source / f"{i}.txt").write_text("right")
    (source / "bad.mp4").write_bytes(file()[:200])
    (source / "bad.txt").write_text("right")
    report = pack(tmp_path / "source", tmp_path / "raw", progress=False)
    assert report.modalities["video"] == 6 and report.samples == {"train": 6}
    assert "bad" in (tmp_path / "raw" / "quarantine.jsonl").read_text()
    tokenizers: dict[str, Any] = {
        "video": VideoTubesConfig(fps=5.0, patch=16, size=48).build(),
        "text": BytesConfig(modality="text").build(),
    }
    pack(tmp_path / "raw", tmp_path / "tokens", tokenizers=tokenizers, progress=False)
    shards = ShardSet.open(tmp_path / "tokens")
    spec = Vocabulary.load(tmp_path / "tokens" / "vocabulary.json").spec("video")
    assert spec.continuous and spec.grid is not None and len(spec.grid) == 3
    shapes = {shards.tokens(i)["video"].shape[:3] for i in range(6)}
    assert shapes == {(2, 2, 3), (3, 2, 3)}


def test_a_conversation_shows_a_video_and_is_answered(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(file())
    part = {"type": "video_url", "video_url": {"url": "a.mp4"}}
    asked = [{"type": "text", "text": "see"}, part, {"type": "text", "text": "which way?"}]
    gone = [{"type": "video", "path": "gone.mp4"}, {"type": "text", "text": "which way?"}]
    rows = [
        [{"role": "user", "content": what}, {"role": "assistant", "content": "right."}]
        for what in (asked, gone, "and?")
    ]
    src = jsonl(tmp_path / "talks.jsonl", [{"messages": row} for row in rows])
    tools = {"text": bpe(), "video": VideoTubesConfig(fps=5.0, patch=16, size=48).build()}
    config = PackConfig(src=src, out=tmp_path / "out", tokenizers=tools, max_bad=0.5)
    shown = preview(PackJob(config))
    report = PackJob(config).run(progress=False)
    found = inspect_loss(tmp_path / "out", tools)
    assert shown == [(each["key"], each["runs"]) for each in found], "media where they will stand"
    assert found[0]["runs"][1][0].startswith("[video: ")
    (said,) = report.examples.values()
    assert said.endswith("'gone.mp4': no such file (talks.jsonl:2)")
    shards = ShardSet.open(tmp_path / "out")
    assert shards.vocabulary is not None
    segments = sample_segments(shards, 0, shards.vocabulary)
    assert [s.modality for s in segments] == ["text", "video", "text"]
    assert segments[1].role == "condition" and len(segments[1].ids)
    assert learnt(tmp_path / "out", tools["text"]) == ["right.■"]
