"""Samples a second of our reader, beside webdataset and MosaicML streaming on the same samples.

python benchmarks/data_reader.py [--samples 2000] [--repeats 5] [--json FILE]

Every reader gives the same decoded samples (text, uint8 RGB image, float32 mono audio), which is
checked first; then each reads all of them in turn, several times, and the medians are compared.
Ours reads in a random order over the whole set, webdataset in the order of the files, MosaicML
streaming (where it is installed) as its `StreamingDataset` is indexed. Bars: 0.9 of webdataset, 1.0
of streaming.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Decoded = tuple[str, str, np.ndarray, np.ndarray]  # key, text, image, audio


def make(out: Path, samples: int, size: int) -> Path:
    """Pack ``samples`` of text, PNG and WAV."""
    import soundfile
    from PIL import Image

    from mm.data.pack.job import pack

    rng = np.random.default_rng(0)
    raw = out / "raw"
    raw.mkdir(parents=True)
    for i in range(samples):
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size)).save(raw / f"{i:06d}.png")
        soundfile.write(raw / f"{i:06d}.wav", rng.uniform(-0.5, 0.5, 8000), 16000)
        (raw / f"{i:06d}.txt").write_text(f"caption {i} " + "word " * int(rng.integers(5, 60)))
    pack(raw, out / "shards", shard_mb=16, progress=False)
    return out / "shards"


def plain(key: str, text: bytes, image: bytes, audio: bytes) -> Decoded:
    """Decode with the libraries that everybody uses."""
    import soundfile
    from PIL import Image

    samples, _ = soundfile.read(io.BytesIO(audio), dtype="float32")
    return key, text.decode(), np.array(Image.open(io.BytesIO(image)).convert("RGB")), samples


def ours(shards: Path) -> Callable[[], Iterator[Decoded]]:
    """`ShardSet` in the order of a counter-based permutation."""
    from mm.data.shards.reader import ShardSet
    from mm.data.streams.shuffle import permute

    opened = ShardSet.open(shards)

    def read() -> Iterator[Decoded]:
        for i in permute(np.arange(len(opened)), len(opened), 7):
            sample = opened[int(i)]
            v = sample.values
            yield sample.key, v["text"], v["image"], v["audio"].samples

    return read


def webdataset(shards: Path) -> Callable[[], Iterator[Decoded]]:
    """A bare `WebDataset` over the same tars."""
    from mm.data.pack.writer import secure_webdataset

    module = secure_webdataset()
    paths = [str(p) for p in sorted((shards / "train").glob("*.tar"))]

    def read() -> Iterator[Decoded]:
        for s in module.WebDataset(paths, shardshuffle=False):
            yield plain(s["__key__"], s["txt"], s["png"], s["wav"])

    return read


def streaming(shards: Path, out: Path) -> Callable[[], Iterator[Decoded]]:
    """The same samples as MDS shards; raises ImportError where the package is missing."""
    from streaming import LocalDataset, MDSWriter  # type: ignore[import-not-found]

    from mm.data.shards.reader import ShardSet

    opened = ShardSet.open(shards)
    columns = {"key": "str", "text": "bytes", "image": "bytes", "audio": "bytes"}
    with MDSWriter(out=str(out), columns=columns, size_limit="16mb") as writer:
        for i in range(len(opened)):
            raw = {m: opened.raw(i, m) for m in ("text", "image", "audio")}
            writer.write({"key": opened.key(i)} | {m: v[1] for m, v in raw.items() if v})
    dataset: Any = LocalDataset(local=str(out))

    def read() -> Iterator[Decoded]:
        for i in range(len(dataset)):
            s = dataset[i]
            yield plain(s["key"], s["text"], s["image"], s["audio"])

    return read


def main() -> int:
    """Measure and print. Returns 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = make(Path(folder), given.samples, given.size)
        readers = {"ours": ours(shards), "webdataset": webdataset(shards)}
        try:
            readers["streaming"] = streaming(shards, Path(folder) / "mds")
        except ImportError as error:
            sys.stdout.write(f"streaming is left out: {error}\n")
        first = {s[0]: s for s in readers["ours"]()}
        for name, read in readers.items():
            found = {s[0]: s for s in read()}
            same = found.keys() == first.keys() and all(
                s[1] == first[k][1] and all(np.array_equal(s[n], first[k][n]) for n in (2, 3))
                for k, s in found.items()
            )
            if not same or len(found) != given.samples:
                raise SystemExit(f"{name} gives other samples")
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(given.repeats):  # in turn, so that a busy machine is busy for all
            for name, read in readers.items():
                begun = time.process_time()
                for _ in read():
                    pass
                seconds[name].append(time.process_time() - begun)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {
        "samples": given.samples,
        "samples_per_cpu_second": {n: given.samples / s for n, s in median.items()},
        "ratio": {n: s / median["ours"] for n, s in median.items() if n != "ours"},
        "bar": {"webdataset": 0.9, "streaming": 1.0},
    }
    for name, value in result["samples_per_cpu_second"].items():
        ratio = result["ratio"].get(name)
        said = "" if ratio is None else f", ours is {ratio:.2f}x (bar {result['bar'][name]}x)"
        sys.stdout.write(f"{name}: {value:,.0f} samples a CPU second{said}\n")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(r < result["bar"][n] for n, r in result["ratio"].items()))


if __name__ == "__main__":
    raise SystemExit(main())
