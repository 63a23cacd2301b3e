"""What the data of one process cost as the number of processes grows.

python benchmarks/world.py [--runs runs/quickstart] [--worlds 1,8,64,512,4096] [--steps 300]
    [--samples 1000000,100000000,1000000000] [--json FILE]

One process plays rank 0 of W with 8 rows of its own, over the quickstart's token shards with its
transforms (`mm quickstart` makes them):

- processor time of the own tokens at each W. Bars: at the largest at most 1.25 times that of 1, and
  400,000 tokens a second of a core at 1. Worlds take turns, so that a busy machine is busy for all;
- padding share of the row streams beside first fit within blocks of 1,024 samples over all rows, as
  it was before, on the quickstart's lengths and on log-normal ones. Bar: one percent point;
- opening an index of so many samples in 100,000 shards (sparse files: what it says is 0), making a
  stream of it and planning the first step's blocks: seconds, and private memory, what the process
  does not share with others through the page cache. Bars: 2 s and 200 MiB at the largest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mm.data.pack.writer import write_manifest
from mm.data.shards.index import sha256
from mm.data.shards.reader import HASHED, VOCABULARY
from mm.data.streams.blocks import Document, first_fit, lay_rows
from mm.data.streams.documents import TokenSource
from mm.data.streams.packed import BLOCK_ROWS, PackedConfig, PackedStream
from mm.run import Run
from mm.specs import TokenSpec
from mm.vocabulary import extend_vocabulary

ROWS = 8  # of rank 0
OLD_BLOCK = 1024  # samples that were packed together, over all rows
SHARDS = 100_000
LOG_NORMAL = (  # tokens of a row, documents at most, median and sigma of the lengths
    (256, 16, 24, 0.8),
    (2048, 32, 300, 1.0),
    (4096, 64, 150, 1.2),
    (8192, 32, 2500, 0.7),
)
CONFIG = Path(__file__).parents[1] / "configs/quickstart/backbone.yaml"


def quickstart(runs: Path, world: int) -> PackedStream:
    """Rank 0 of ``world`` over the quickstart's shards, with its transforms."""
    stage = Run.load(CONFIG).stages[0]
    sources = tuple(
        source.model_copy(update={"path": runs / "tokens" / Path(source.path).name})
        for source in stage.data.sources
    )
    changed = {"sources": sources, "batch_size": ROWS * world, "prefetch": 0}
    transform = stage.objective.transform
    return stage.data.model_copy(update=changed).build(transform=transform, rank=0, world=world)


def time_of_tokens(runs: Path, worlds: Sequence[int], steps: int) -> dict[str, Any]:
    """Processor time of a step of the own rows, by W; the mean, as planning comes in blocks."""
    streams = {world: quickstart(runs, world) for world in worlds}
    seconds = dict.fromkeys(worlds, 0.0)
    gc.collect()  # as where a stage trains (`StageState.settle`)
    gc.freeze()
    for turn in range(steps // 10 + 1):
        for world, stream in streams.items():  # in turn
            begun = time.thread_time()
            for _ in range(10):
                stream.next()
            if turn:  # the first reads the shards
                seconds[world] += time.thread_time() - begun
    done = steps // 10 * 10
    tokens = ROWS * streams[worlds[0]].config.seq_len
    return {
        "ms_per_step": {w: 1e3 * s / done for w, s in seconds.items()},
        "tokens_per_second": {w: tokens * done / s for w, s in seconds.items()},
        "ratio": seconds[worlds[-1]] / seconds[worlds[0]],
        "cursor_entries": {w: len(s.state_dict()["cursor"]) for w, s in streams.items()},
    }


def padding(lengths: np.ndarray, seq_len: int, most: int, block: int) -> dict[str, float]:
    """Padding share of documents (D,) laid out as before and in blocks of a row stream."""
    share = lambda rows: 1 - used / (rows * seq_len)
    before = streams = used = 0
    for start in range(0, len(lengths) - OLD_BLOCK + 1, OLD_BLOCK):
        part = lengths[start : start + OLD_BLOCK]
        used += int(part.sum())
        before += len(first_fit(part, seq_len, most))
    n = len(lengths) // OLD_BLOCK * OLD_BLOCK
    for number, start in enumerate(range(0, n, block)):
        named = [Document(0, 0, 0, 0, m) for m in lengths[start : min(start + block, n)].tolist()]
        streams += len(lay_rows(named, seq_len, most, number))
    return {"before": share(before), "streams": share(streams), "block_samples": block}


def paddings(runs: Path | None, n: int) -> dict[str, dict[str, float]]:
    """By what the lengths are; ``n`` documents of each."""
    found, rng = {}, np.random.default_rng(0)
    if runs is not None:
        stream = quickstart(runs, 1)
        config, drawn = stream.config, []
        for number in range(n // stream.block_samples):
            drawn += [d.length for row in stream.plan_block(number).rows for d in row]
        lengths = rng.permutation(np.array(drawn))
        sizes = (config.seq_len, config.max_documents, stream.block_samples)
        found["quickstart"] = padding(lengths, *sizes)
    for seq_len, most, median, sigma in LOG_NORMAL:
        lengths = np.exp(rng.normal(np.log(median), sigma, n)).astype(np.int64) + 3
        lengths = lengths[lengths <= seq_len]
        block = max(16, round(BLOCK_ROWS * min(seq_len / lengths.mean(), most)))
        name = f"log-normal, median {median}, sigma {sigma}, rows of {seq_len}"
        found[name] = padding(lengths, seq_len, most, block)
    return found


# ---- a large index ---------------------------------------------------------------------------


def sparse_npz(path: Path, columns: dict[str, tuple[Any, int, int]]) -> None:
    """An uncompressed .npz of one-dimensional columns that are holes, but for their last entry.

    Args:
        columns: name -> (dtype or a whole array, entries, last entry).
    """
    central = b""
    with open(path, "wb") as file:
        for name, (what, count, last) in columns.items():
            array = what if isinstance(what, np.ndarray) else None
            dtype = array.dtype if array is not None else np.dtype(what)
            descr = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
            text = repr(descr).encode()
            head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117) + b"\n"
            size, at, member = len(head) + count * dtype.itemsize, file.tell(), f"{name}.npy"
            # of a hole it is never asked for, as only its head is read
            crc = 0 if array is None else zlib.crc32(head + array.tobytes())
            wide = struct.pack("<HHQQ", 1, 16, size, size)  # zip64
            fixed = struct.pack("<HHHHHIII", 45, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF)
            names = struct.pack("<HH", len(member), len(wide))
            file.write(
                b"PK\x03\x04" + fixed[:2] + fixed[2:] + names + member.encode() + wide + head
            )
            _column(file, array, count, dtype, last)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, at)
            central += b"PK\x01\x02" + struct.pack("<H", 45) + fixed
            central += struct.pack("<HHHHHII", len(member), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
            central += member.encode() + extra
        start = file.tell()
        file.write(central)
        end, n = file.tell(), len(columns)
        record = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, n, n, len(central), start)
        file.write(b"PK\x06\x06" + record)
        file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, n, n, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def _column(
    file: BinaryIO, array: np.ndarray | None, count: int, dtype: np.dtype, last: int
) -> None:
    if array is not None:
        file.write(array.tobytes())
        return
    file.seek((count - 1) * dtype.itemsize, os.SEEK_CUR)
    file.write(np.array([last], dtype).tobytes())


def large_set(root: Path, n: int) -> None:
    """Token shards of ``n`` samples of text, of which only manifest, vocabulary and index exist."""
    folder = root / "train"
    folder.mkdir(parents=True)
    key_bytes = 10
    sparse_npz(
        folder / "index.npz",
        {
            "kinds": (np.array(["text.npy"]), 1, 0),
            "start": (np.int64, n + 1, n),
            "kind": (np.int16, n, 0),
            "shard": (np.int32, n, SHARDS - 1),
            "offset": (np.int64, n, 0),
            "size": (np.int64, n, 0),
            "key_bytes": (np.uint8, key_bytes * n, 0),
            "key_start": (np.int64, n + 1, key_bytes * n),
            "length_text": (np.int64, n, 0),
        },
    )
    vocabulary = extend_vocabulary([TokenSpec("text", 256, fingerprint="world")])
    vocabulary.save(root / VOCABULARY)
    sizes = np.diff(np.linspace(0, n, SHARDS + 1).astype(np.int64)).tolist()
    shards = [
        {"name": f"shard-{i:06d}.tar", "samples": m, "bytes": 1024 * m, "sha256": f"{i:064x}"}
        for i, m in enumerate(sizes)
    ]
    size = (folder / "index.npz").stat().st_size
    digest = sha256(folder / "index.npz") if size <= HASHED else "0" * 64
    index = {"name": "index.npz", "bytes": size, "sha256": digest}
    entry = {
        "samples": n,
        "bytes": 1024 * n,
        "shards": shards,
        "index": index,
        "lengths": {"text": {"count": n, "total": 100 * n, "min": 0, "max": 200}},
    }
    manifest = {
        "format": "mm-shards",
        "version": 1,
        "kind": "tokens",
        "modalities": ["text"],
        "source": "world",
        "license": "",
        "quarantined": 0,
        "splits": {"train": entry},
        "vocabulary": {"fingerprint": vocabulary.fingerprint, "size": vocabulary.size},
    }
    write_manifest(root, manifest)


def private_mib() -> float:
    """Memory that is this process's own, in MiB; mapped pages of files belong to the page cache."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kb = [int(x.split()[1]) for x in lines if x.startswith(("Private_Dirty:", "Swap:"))]
    return sum(kb) / 1024


def open_large(root: Path) -> dict[str, float]:
    """In a process of its own: what opening takes, and planning of the first blocks."""
    config = PackedConfig(
        sources=(TokenSource(path=root),), seq_len=256, batch_size=ROWS, cut=True, prefetch=0
    )
    before, begun = private_mib(), time.perf_counter()
    stream = config.build(rank=0, world=1)
    opened, seconds = private_mib(), time.perf_counter() - begun
    for number in range(ROWS):
        stream.plan_block(number)
    return {
        "seconds": seconds,
        "private_mib": opened - before,
        "seconds_with_blocks": time.perf_counter() - begun,
        "private_mib_with_blocks": private_mib() - before,
        "private_mib_of_the_imports": before,
    }


def large_indices(samples: Sequence[int]) -> dict[str, dict[str, float]]:
    """By number of samples, each in a process of its own."""
    found = {}
    for n in samples:
        with tempfile.TemporaryDirectory() as folder:
            large_set(Path(folder) / "set", n)
            command = [sys.executable, __file__, "--open", str(Path(folder) / "set")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[f"{n:,}"] = json.loads(said)
    return found


def judged(found: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(what, figure, bar, whether it is met)."""
    rows = []
    if "tokens" in found:
        fastest = next(iter(found["tokens"]["tokens_per_second"].values()))
        rows.append(("time a token, most processes over one", found["tokens"]["ratio"], 1.25, True))
        rows.append(("tokens a second of a core", fastest, 400_000.0, False))
    for name, shares in found["padding"].items():
        more = 100 * (shares["streams"] - shares["before"])
        rows.append((f"points of padding more, {name}", more, 1.0, True))
    for n, opened in found["index"].items():
        rows.append((f"seconds to open {n} samples", opened["seconds"], 2.0, True))
        rows.append((f"MiB private, {n} samples", opened["private_mib_with_blocks"], 200.0, True))
    return [(what, x, bar, x <= bar if most else x >= bar) for what, x, bar, most in rows]


def main() -> int:
    """Measure and print. Returns 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--worlds", default="1,8,64,512,4096")
    parser.add_argument("--samples", default="1000000,100000000,1000000000")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open is not None:
        sys.stdout.write(json.dumps(open_large(given.open)))
        return 0
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    runs = given.runs if (given.runs / "tokens").is_dir() else None
    found: dict[str, Any] = {}
    if runs is None:
        sys.stdout.write(f"{given.runs}/tokens is not there: mm quickstart makes it\n")
    else:
        found["tokens"] = time_of_tokens(runs, numbers(given.worlds), given.steps)
    found["padding"] = paddings(runs, 64 * OLD_BLOCK)
    found["index"] = large_indices(numbers(given.samples))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    missed = 0
    for what, figure, bar, met in judged(found):
        missed += not met
        sys.stdout.write(
            f"{'met   ' if met else 'MISSED'} {what}: {figure:,.4g} (bar {bar:,.4g})\n"
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
