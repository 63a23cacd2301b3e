"""Worker processes of a pack: the same bytes whatever their number, their end or a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from data_toys import ToyTokenizer, png, toys

from mm.data.pack import pool
from mm.data.pack.job import pack
from mm.data.pack.pool import Pool, batches
from mm.data.pack.report import PackReport
from mm.data.sources.base import Record
from mm.errors import UserError
from mm.specs import Encoded

N = 150


class Fatal(ToyTokenizer):
    """Ends its process, or raises, at a text; ``once``: only while that file is not there."""

    def __init__(self, at: str, how: str, once: Path | None = None):
        super().__init__("text", 64)
        self.at, self.how, self.once = at, how, once

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        if any(self.at in raw for raw in raws) and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            if self.how == "exit":
                os._exit(3)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise (UserError if self.how == "user" else ZeroDivisionError)("no such word")
        return super().encode(raws)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    """Workers start at once; says which pools there were."""
    monkeypatch.setattr(pool, "START_S", 0.0)
    found: list[Pool] = []
    begin = Pool.__init__

    def watched(self: Pool, payload: bytes, n: int) -> None:
        begin(self, payload, n)
        found.append(self)

    monkeypatch.setattr(Pool, "__init__", watched)
    return found


def rows(root: Path, n: int = N) -> Path:
    """A manifest with pictures, a few of them bad or twice there."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        (root / f"{i}.png").write_bytes(b"no picture" if i % 50 == 7 else png(i % 120))
        row = {"key": f"k{i:03d}", "text": f"word {i % 90} " + "x" * (i % 120 % 9)}
        lines.append(row | {"image": f"{i}.png" if i != 11 else "gone.png"})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return root / "rows.jsonl"


def quiet(src: Path, out: Path, n: int, **kw: Any) -> PackReport:
    return pack(src, out, workers=n, progress=False, max_bad=0.5, shard_mb=0.02, **kw)


def same(a: Path, b: Path) -> bool:
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.mark.parametrize("tokens", [pytest.param(False, marks=pytest.mark.slow), True])
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, tokens: bool, monkeypatch: pytest.MonkeyPatch, started: list[Pool]
) -> None:
    monkeypatch.setattr("mm.data.pack.job.BATCH", 32)
    src = rows(tmp_path / "src")
    given = {"dedupe": "image"} | ({"tokenizers": toys()} if tokens else {})
    one = quiet(src, tmp_path / "one", 1, **given)
    assert not started and one.quarantined == 4 and one.duplicates == 28
    two = quiet(src, tmp_path / "two", 2, **given)
    (pool,) = started
    assert len(pool.all) == 2 and all(w.process.returncode is not None for w in pool.all)
    assert same(tmp_path / "one", tmp_path / "two")
    assert (two.samples, two.rejected, two.lengths) == (one.samples, one.rejected, one.lengths)


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from mm.data.pack import output, pool
from mm.data.pack.job import pack
output.JOURNAL_SECONDS = pool.START_S = 0.0
done = output.PackOutput.add
def add(self, *args):
    done(self, *args)
    if self.records >= 90:
        os.kill(os.getpid(), signal.SIGKILL)
output.PackOutput.add = add
pack(Path({src!r}), Path({out!r}), workers=2, progress=False, max_bad=0.5, shard_mb=0.02)
"""


@pytest.mark.slow
def test_a_killed_pack_goes_on(tmp_path: Path) -> None:
    """Killed with workers, gone on without or with them: the bytes of a pack in one go.

    And no worker outlives its parent.
    """
    src = rows(tmp_path / "src")
    quiet(src, tmp_path / "one", 1)
    code = CHILD.format(path=sys.path, src=str(src), out=str(tmp_path / "out"))
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-500:]
    (part,) = tmp_path.glob(".out.part-*")
    assert 0 < json.loads((part / "progress.json").read_text())["records"] < N
    deadline = time.monotonic() + 30
    while left := _workers_below(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    quiet(src, tmp_path / "out", 2)
    assert same(tmp_path / "one", tmp_path / "out")


def _workers_below(folder: Path) -> list[int]:
    """Processes that a dead parent left, found by the folder that is theirs."""
    out = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            if b"mm.data.pack.worker" in command and (entry / "stat").read_text().split()[3] == "1":
                out.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return out


@pytest.mark.parametrize(
    "how", ["exit", *(pytest.param(how, marks=pytest.mark.slow) for how in ("raise", "user"))]
)
def test_a_sample_that_ends_its_worker_is_named(tmp_path: Path, how: str) -> None:
    src = rows(tmp_path / "src", 40)
    given = {"tokenizers": {"text": Fatal("word 33 ", how)}}
    wanted = {
        "exit": (UserError, r"^sample 'k033' \(rows.jsonl:34\): ends the process .*exit code 3"),
        "raise": (RuntimeError, r"^sample 'k033' .*: ZeroDivisionError: no such word\nTraceback"),
        "user": (UserError, r"^sample 'k033' \(rows.jsonl:34\): no such word(;|$)"),
    }[how]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm.data.pack.job.BATCH", 16)
        with pytest.raises(wanted[0], match=wanted[1]):
            quiet(src, tmp_path / "out", 2, **given)
        if how == "raise":
            with pytest.raises(ZeroDivisionError) as error:
                quiet(src, tmp_path / "out", 1, **given)
            assert error.value.__notes__ == ["at sample 'k033' (rows.jsonl:34)"]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.part-*"))


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Pool]
) -> None:
    monkeypatch.setattr("mm.data.pack.job.BATCH", 16)
    src = rows(tmp_path / "src", 60)
    quiet(src, tmp_path / "one", 1, tokenizers={"text": toys()["text"]})
    fatal = Fatal("word 33 ", "kill", tmp_path / "once")
    quiet(src, tmp_path / "two", 2, tokenizers={"text": fatal})
    assert (tmp_path / "once").exists() and len(started[0].all) == 3, (
        "one took the dead one's place"
    )
    assert same(tmp_path / "one", tmp_path / "two")


def test_what_cannot_be_sent_is_done_here(
    tmp_path: Path, started: list[Pool], caplog: pytest.LogCaptureFixture
) -> None:
    """Readers of a plugin that are no picklable objects; a tokenizer that is none."""

    class Local(ToyTokenizer):
        pass

    src = rows(tmp_path / "src", 20)
    quiet(src, tmp_path / "a", 2, tokenizers={"text": Local("text", 64)})
    assert not started and "packing in one process" in caplog.text

    from mm.data.modalities.base import table
    from mm.data.pack.worker import Work

    def records() -> Iterator[Record]:
        for i in range(40):
            yield Record(f"k{i}", "here", {"text": lambda i=i: b"text %d" % i})

    done = [
        p for b in batches(records(), Work(table().modalities, None, None), 1, 2) for p in b.items
    ]
    assert [p.raws for p in done] == [{"text": b"text %d" % i} for i in range(40)] and started
