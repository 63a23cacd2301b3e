"""Packs that go on after a kill, duplicates, reports; shards behind URLs; large indexes; memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import ToyTokenizer, folder, png, token_shards, toys

from mm.data.modalities.base import table
from mm.data.pack import encode, output
from mm.data.pack.job import pack
from mm.data.pack.writer import write_manifest
from mm.data.shards.index import Index, sha256
from mm.data.shards.manifest import read_manifest
from mm.data.shards.reader import ShardSet
from mm.data.shards.remote import fetch, is_url, join
from mm.data.streams.packed import PackedConfig
from mm.errors import UserError

# ---- pack ------------------------------------------------------------------------------------


def rows(root: Path, n: int = 1200) -> Path:
    """Texts of two splits, some unreadable, some twice."""
    root.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(n):
        text = f"{i % 900} " + "word " * (i % 900 % 13)
        row = {"key": f"k{i}", "text": text, "split": "val" if i % 10 == 0 else "train"}
        out.append("broken" if i % 211 == 7 else json.dumps(row))
    (root / "rows.jsonl").write_text("\n".join(out) + "\n")
    return root / "rows.jsonl"


CHILD = """
import os, signal, sys
from pathlib import Path
from data_toys import ToyTokenizer
from mm.data.pack import output
from mm.data.pack.job import pack

output.JOURNAL_SECONDS = 0.0

class Dying(ToyTokenizer):
    def encode(self, raws):
        if self.seen >= {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(raws)

pack(Path({src!r}), Path({out!r}), tokenizers={{"text": Dying("text", 64)}}, dedupe="sample",
     progress=False, shard_mb=0.05, max_bad=0.5)
"""


def test_a_killed_pack_goes_on(tmp_path: Path) -> None:
    """Whatever the kill left, the bytes are those of a pack in one go."""
    src = rows(tmp_path / "src")
    given = {"dedupe": "sample", "progress": False, "shard_mb": 0.05, "max_bad": 0.5}
    tokenizers = lambda: {"text": toys()["text"]}
    whole = pack(src, tmp_path / "whole", tokenizers=tokenizers(), **given)
    assert whole.duplicates > 290 and whole.quarantined == 6
    code = CHILD.format(after=500, src=str(src), out=str(tmp_path / "out"))
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-500:]
    assert not (tmp_path / "out").exists()
    (part,) = tmp_path.glob(".out.part-*")
    done = json.loads((part / "progress.json").read_text())["records"]
    assert 0 < done < 1200
    for extra in [
        max(s.glob("*.tar")) for s in part.iterdir() if s.is_dir()
    ]:  # what stood after the journal is cut off
        with open(extra, "ab") as file:
            file.write(b"half a sample")
    again = tokenizers()
    report = pack(src, tmp_path / "out", tokenizers=again, **given)
    assert again["text"].seen < 700, "what was done is not done again"
    assert report.samples == whole.samples and report.rejected == whole.rejected
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*"))
    assert names == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*"))
    for name in names:
        if (tmp_path / "whole" / name).is_file():
            assert (tmp_path / "out" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()
    assert not list(tmp_path.glob(".out.part-*"))


def test_codes_are_kept_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 ids are 400 bytes with what is around them: two of them fit."""
    monkeypatch.setattr(encode, "CACHE_BYTES", 1000)
    toy = ToyTokenizer("text", 64)
    encoder = encode.Encoder({"text": toy}, table().modalities)
    items = [encode.Item({"text": bytes([97 + i]) * 50}, i) for i in range(5)]
    for again, seen in ((items, 5), (items[3:], 5), (items[:1], 6), (items[:1] * 3, 6)):
        results = encoder.encode(again)
        assert [r.rest for r in results] == [item.rest for item in again]
        assert all(r.encoded["text"].ids[0] == (97 + r.rest) % 64 for r in results)
        assert toy.seen == seen and len(encoder._cache) == 2
    assert encoder._held == 800


class Interrupted(ToyTokenizer):
    """Stops as Ctrl-C does once it has encoded 100 values."""

    def encode(self, raws: Any) -> Any:
        if self.seen >= 100:
            raise KeyboardInterrupt
        return super().encode(raws)


def test_an_interrupted_pack_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "JOURNAL_SECONDS", 0.0)
    src, given = rows(tmp_path / "src", 300), {"progress": False, "workers": 1, "max_bad": 0.5}
    whole = pack(src, tmp_path / "whole", tokenizers={"text": ToyTokenizer("text", 64)}, **given)
    with pytest.raises(KeyboardInterrupt):
        pack(src, tmp_path / "out", tokenizers={"text": Interrupted("text", 64)}, **given)
    (part,) = tmp_path.glob(".out.part-*")
    journal = json.loads((part / "progress.json").read_text())
    assert journal["good"] + journal["bad"] == journal["records"] >= 100
    again = ToyTokenizer("text", 64)
    assert pack(src, tmp_path / "out", tokenizers={"text": again}, **given).samples == whole.samples
    assert again.seen <= 300 - journal["records"]
    for path in (p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        other = tmp_path / "out" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes(), path.name


def test_a_journal_of_another_source_is_not_used(tmp_path: Path) -> None:
    src = rows(tmp_path / "src", 40)
    stale = tmp_path / ".out.part-999999999"
    stale.mkdir()
    (stale / "progress.json").write_text(json.dumps({"identity": "another", "records": 10}))
    report = pack(src, tmp_path / "out", progress=False, max_bad=0.5)
    assert sum(report.samples.values()) == 39 and not stale.exists()


def test_duplicates_by_content(tmp_path: Path) -> None:
    """Of all modalities, or of one."""
    src = tmp_path / "src"
    src.mkdir()
    lines = []
    for i in range(12):
        (src / f"{i}.png").write_bytes(png(i % 4))
        lines.append(json.dumps({"key": f"k{i}", "image": f"{i}.png", "text": f"t{i % 6}"}))
    (src / "rows.jsonl").write_text("\n".join(lines))
    both = pack(src / "rows.jsonl", tmp_path / "a", dedupe="sample", progress=False)
    assert both.samples == {"train": 12} and both.duplicates == 0
    images = pack(src / "rows.jsonl", tmp_path / "b", dedupe="image", progress=False)
    assert images.samples == {"train": 4} and images.duplicates == 8 and not images.quarantined
    found = [json.loads(x) for x in (tmp_path / "b/duplicates.jsonl").read_text().splitlines()]
    assert found[0] == {"source": "rows.jsonl:5", "key": "k4", "same_as": "k0"}
    tokens = pack(
        src / "rows.jsonl", tmp_path / "c", dedupe="text", tokenizers=toys(), progress=False
    )
    assert tokens.samples == {"train": 6}
    with pytest.raises(UserError, match="--dedupe imag: unknown; did you mean 'image'"):
        pack(src / "rows.jsonl", tmp_path / "d", dedupe="imag", progress=False)


def test_the_report_says_what_and_why(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 6, splits=("train",))
    (src / "train/item000.png").write_bytes(b"no image")
    (src / "train/item001.txt").write_text("")
    (src / "train/item002.txt").write_text("x" * 100)
    report = pack(src, tmp_path / "out", progress=False, max_bad=0.9)
    assert report.quarantined == 2 and sum(report.rejected.values()) == 2
    assert any(reason.startswith("image: unreadable header") for reason in report.rejected)
    assert report.histograms["train"]["text"] == {"8": 3, "64": 1}
    assert report.histograms["train"]["audio"] == {"256": 4}
    assert json.loads(json.dumps(report.to_dict()))["rejected"] == report.rejected
    assert pack(src, tmp_path / "out", progress=False, max_bad=0.9).rejected == report.rejected


# ---- URLs ------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; counts what was asked for; fails once where told to."""

    asked: list[str] = []
    fail: set[str] = set()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path in self.fail:
            self.fail.discard(self.path)
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Token shards behind HTTP, with an empty cache."""
    monkeypatch.setenv("MM_DATA_CACHE", str(tmp_path / "cache"))
    token_shards(tmp_path / "data", 60)
    Handler.asked, Handler.fail = [], set()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "data"))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def config(where: object, **kw: object) -> PackedConfig:
    return PackedConfig(
        sources=[{"path": where}], seq_len=64, batch_size=4, block_samples=16, prefetch=0, **kw
    )


def test_a_url_gives_what_the_folder_gives(served: str, tmp_path: Path) -> None:
    local = tmp_path / "data/tokens"
    Handler.fail = {"/tokens/train/shard-000000.tar"}  # once: it is asked again
    kw = {"shuffle": "window", "window_samples": 8}
    streams = [config(p, **kw).build() for p in (local, served + "/tokens", local.as_uri())]
    for _ in range(20):
        a, *others = (s.next()[0] for s in streams)
        assert all(torch.equal(a.ids, b.ids) and a.keys == b.keys for b in others)
    states = [s.state_dict() for s in streams]
    assert states[0] == states[1] == states[2], "a run may move from the one to the other"
    shards = [p for p in Handler.asked if p.endswith(".tar")]
    assert len(shards) == len(set(shards)) + 1 and len(set(shards)) > 3
    before = len(Handler.asked)
    config(served + "/tokens").build().next()
    assert not [p for p in Handler.asked[before:] if p.endswith((".tar", ".npz"))], "cached"


def test_a_remote_stream_reads_shard_after_shard(served: str) -> None:
    stream = config(served + "/tokens", window_samples=8).build()
    stream.next()
    read = {p for p in Handler.asked if p.endswith(".tar")}
    every = len(stream.sources[0].paths)
    assert 1 <= len(read) < every, "one block touches few shards"


def test_what_a_server_gives_is_not_believed(served: str, tmp_path: Path) -> None:
    stream = config(served + "/tokens").build()
    for shard in (tmp_path / "data/tokens/train").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[600] ^= 1
        shard.write_bytes(content)
    with pytest.raises(UserError, match="http://.*shard-.*tar: .* the manifest says"):
        stream.next()
    with pytest.raises(UserError, match="manifest.json: no such file"):
        ShardSet.open(served + "/nowhere")
    assert not list((tmp_path / "cache").rglob("*.part-*"))


def test_the_cache_has_a_cap(served: str, tmp_path: Path, monkeypatch) -> None:
    shards = ShardSet.open(served + "/tokens")
    entries = read_manifest(tmp_path / "data/tokens")["splits"]["train"]["shards"]
    monkeypatch.setenv("MM_DATA_CACHE_GB", str(2.5 * max(e["bytes"] for e in entries) / 1e9))
    keys = [shards.tokens(i)["text"].tolist() for i in range(len(shards))]
    kept = list((tmp_path / "cache/files").glob("??/*"))
    assert len(entries) > 3 and 1 <= len(kept) <= 3
    assert keys == [shards.tokens(i)["text"].tolist() for i in range(len(shards))]
    again = fetch(join(served, "tokens/train", entries[0]["name"]), entries[0]["sha256"], None)
    assert again.stat().st_size == entries[0]["bytes"]


def test_urls_and_paths(tmp_path: Path) -> None:
    assert is_url("s3://bucket/x") and not is_url(tmp_path) and not is_url("C:/x")
    assert join("http://h/a b/?token=1", "x y") == "http://h/a b/x%20y?token=1"
    assert join("s3://b/c/", "x", "y") == "s3://b/c/x/y"
    with pytest.raises(UserError, match="nope://"):
        ShardSet.open("nope://x/y")


# ---- size ------------------------------------------------------------------------------------


def test_an_index_of_a_million_samples_opens_at_once(tmp_path: Path) -> None:
    """Opened by mapping: time does not depend on the size, nor does memory.

    A whole set, whose index is hashed first, opens within a second (about 0.1 s).
    """
    n, members = 1_000_000, 2_000_000
    keys = np.char.zfill(np.arange(n).astype("S7"), 7)
    index = Index(
        np.array(["text.npy", "json"]),
        np.arange(n + 1) * 2,
        np.tile(np.arange(2, dtype=np.int16), n),
        np.zeros(members, np.int32),
        np.arange(members) * 1024,
        np.full(members, 200),
        np.frombuffer(keys.tobytes(), np.uint8),
        np.arange(n + 1) * 7,
        {"text": np.arange(n) % 91},
    )
    token_shards(tmp_path, 4)
    root = tmp_path / "tokens"
    file = root / "train" / "index.npz"
    index.save(file)
    begun = time.process_time()
    opened = Index.load(file, 1)
    assert time.process_time() - begun < 0.1
    assert len(opened) == n and opened.key(123456) == "0123456"
    assert opened.lengths["text"][77] == 77 and not opened.start.flags.writeable
    for name in ("start", "kind", "shard", "offset", "size", "key_start"):
        np.testing.assert_array_equal(getattr(opened, name)[-5:], getattr(index, name)[-5:])

    manifest = read_manifest(root)
    entry = manifest["splits"]["train"]
    whole = entry["shards"][0] | {"samples": n, "bytes": members * 1024}
    os.truncate(root / "train" / whole["name"], whole["bytes"])  # a hole: it takes no room
    mine = {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
    entry |= {"samples": n, "bytes": whole["bytes"], "shards": [whole], "index": mine}
    write_manifest(root, manifest)
    begun = time.process_time()
    shards = ShardSet.open(root)
    assert time.process_time() - begun < 1.0
    assert len(shards) == n and shards.key(n - 1) == "0999999"


SOAK = textwrap.dedent(
    """
    import resource, sys
    from mm.data.streams.packed import PackedConfig
    from pathlib import Path
    stream = PackedConfig(sources=[{"path": Path(sys.argv[1])}], seq_len=64, batch_size=2,
                          block_samples=64, prefetch=2).build()
    def rss():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
    out = []
    for step in range(10001):
        stream.next()
        if step in (1000, 4000, 7000, 10000):
            out.append(rss())
    stream.close()
    print(*out)
    """
)


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_steps(tmp_path: Path) -> None:
    token_shards(tmp_path, 200)
    found = subprocess.run(
        [sys.executable, "-c", SOAK, str(tmp_path / "tokens")], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-500:]
    sizes = [float(x) for x in found.stdout.split()]
    assert max(sizes) - sizes[0] < 8, f"MB at 1,000, 4,000, 7,000 and 10,000 steps: {sizes}"
