"""Damaged and hostile input: refused or quarantined by name, counted, and never executed."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import pytest
from data_toys import folder, png, tar_of, token_shards, toys

from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.data.shards.verify import verify
from mm.errors import UserError


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def quarantine(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- whole packs -----------------------------------------------------------------------------


def test_bad_samples_are_quarantined_and_counted(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 40, splits=("train",))
    (src / "train/item003.png").write_bytes(png()[:50])
    (src / "train/item007.wav").write_bytes(b"no sound")
    (src / "train/item009.txt").write_bytes(b"\xff\xfe")
    (src / "train/item011.png").unlink()
    report = pack(src, tmp_path / "out", max_bad=0.2, progress=False)
    assert report.quarantined == 4 and report.samples == {"train": 36}
    found = {row["key"]: row for row in quarantine(tmp_path / "out/quarantine.jsonl")}
    assert set(found) == {f"train/item{i:03d}" for i in (3, 7, 9, 11)}
    assert found["train/item003"]["reason"].startswith("image: ")
    assert found["train/item007"]["reason"].startswith("audio: ")
    assert found["train/item009"]["reason"] == "text: no valid UTF-8 at byte 0"
    assert (
        found["train/item011"]["reason"]
        == "incomplete: has audio+text, the other samples have audio+image+text"
    )
    assert found["train/item003"]["source"].startswith("src/train/item003.")
    kept = pack(src, tmp_path / "kept", max_bad=0.2, incomplete="keep", progress=False)
    assert kept.quarantined == 3


def test_the_budget_stops_a_pack(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 40, splits=("train",))
    for i in range(2):
        (src / f"train/item{i:03d}.png").write_bytes(b"broken")
    with pytest.raises(
        UserError,
        match=r"2 of 40 samples are unreadable, more than --max-bad 0.01: 2 x image: .*item000",
    ):
        pack(src, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists(), "nothing half-made"
    assert len(quarantine(tmp_path / "out.quarantine.jsonl")) == 2, "but what was wrong is kept"
    (src / "train/item001.png").write_bytes(png())
    assert pack(src, tmp_path / "out", progress=False).quarantined == 1, (
        "one bad sample never stops a pack"
    )
    for path in src.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="40 of 40|nothing to pack"):
        pack(src, tmp_path / "none", max_bad=1.0, progress=False)


def test_bad_samples_while_tokenising(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 20, splits=("train",))
    (src / "train/item003.png").write_bytes(png()[:50])
    report = pack(src, tmp_path / "out", tokenizers=toys(), max_bad=0.2, progress=False)
    assert report.quarantined == 1 and report.samples == {"train": 19}
    assert quarantine(tmp_path / "out/quarantine.jsonl")[0]["key"] == "train/item003"


def test_manifest_rows_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    src = tmp_path / "src"
    src.mkdir()
    (src / "a.png").write_bytes(png())
    lines = [
        json.dumps({"key": "fine", "image": "a.png", "text": "x"}),
        "{broken",
        "[1]",
        json.dumps({"key": "fine", "image": "a.png", "text": "again"}),
        json.dumps({"key": "gone", "image": "b.png"}),
        json.dumps({"key": "out", "text": {"path": "../secret.txt"}}),
        json.dumps({"key": "abs", "image": str(tmp_path / "secret.txt")}),
        json.dumps({"key": "none", "text": None}),
        json.dumps({"key": "number", "image": 3}),
        json.dumps({"key": "split", "text": "x", "split": "../up"}),
        '{"key": "surrogate", "text": "\\ud800"}',
        json.dumps({"key": "nul", "image": "a\0.png"}),
    ]
    (src / "rows.jsonl").write_text("\n".join(lines) + "\n")
    report = pack(src / "rows.jsonl", tmp_path / "out", max_bad=1.0, progress=False)
    assert report.samples == {"train": 1} and report.quarantined == 11
    rows = quarantine(tmp_path / "out/quarantine.jsonl")
    reasons = {row["source"]: row["reason"] for row in rows}
    assert reasons["rows.jsonl:2"].startswith("json: ") and "no object" in reasons["rows.jsonl:3"]
    assert reasons["rows.jsonl:4"] == "duplicate key 'fine', first at rows.jsonl:1"
    assert reasons["rows.jsonl:5"] == "'b.png': no such file"
    assert "leads out of" in reasons["rows.jsonl:6"] and "leads out of" in reasons["rows.jsonl:7"]
    assert reasons["rows.jsonl:9"] == "image: expected a path, found int"
    assert "is no plain lower-case word" in reasons["rows.jsonl:10"]
    assert "secret" not in (tmp_path / "out/train/shard-000000.tar").read_bytes().decode("latin1")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../../evil.txt"),
        member("/etc/evil.txt"),
        member("a/../../evil.txt"),
        member("evil.txt", tarfile.SYMTYPE, "/etc/passwd"),
        member("evil.txt", tarfile.LNKTYPE, "a.txt"),
        member("evil.txt", tarfile.CHRTYPE),
        member("evil.txt", tarfile.FIFOTYPE),
    ],
)
def test_hostile_tars_are_refused_by_name(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    tar_of(tmp_path / "in.tar", [("a.txt", b"fine"), (bad, b"evil")])
    with pytest.raises(UserError, match=r"in\.tar: member '.*evil.txt' .*refused"):
        pack(tmp_path / "in.tar", tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.tar"]


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.txt")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(10**10),
        "GNU.sparse.name": "huge.txt",
    }
    tar_of(tmp_path / "in.tar", [(info, b"0\n".ljust(512, b"\0"))])
    with pytest.raises(UserError, match="'huge.txt' is no plain file .*sparse.*: refused"):
        pack(tmp_path / "in.tar", tmp_path / "out", progress=False)


@pytest.mark.parametrize("cut", ["inside", "zero", "random", "gzip"])
def test_damaged_tars(tmp_path: Path, cut: str) -> None:
    import gzip

    good = tar_of(
        tmp_path / "good.tar", [("a.txt", b"x" * 2000), ("b.txt", b"y" * 2000)]
    ).read_bytes()
    data = {
        "inside": good[:3500],
        "zero": b"",
        "random": bytes(range(256)) * 10,
        "gzip": gzip.compress(good),
    }[cut]
    (tmp_path / "in.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"in\.tar: "):
        pack(tmp_path / "in.tar", tmp_path / "out", progress=False)


def test_no_pickle_ever_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    payload = pickle.dumps(Bomb(trap))
    members = [
        ("a.txt", b"fine"),
        ("b.txt", b"fine"),
        ("b.pyd", payload),
        ("c.pkl", payload),
        ("d.txt", b"fine"),
    ]
    tar_of(tmp_path / "in.tar", members)
    report = pack(tmp_path / "in.tar", tmp_path / "out", max_bad=1.0, progress=False)
    assert report.samples == {"train": 2} and report.quarantined == 2
    assert all(
        "can run code" in row["reason"] for row in quarantine(tmp_path / "out/quarantine.jsonl")
    )
    shard = tmp_path / "out/train/shard-000000.tar"
    size, name = shard.stat().st_size, json.loads((tmp_path / "out/manifest.json").read_text())
    tar_of(shard, [("a.txt", b"fine"), ("a.pyd", payload), ("d.txt", b"fine")])
    name["splits"]["train"]["shards"][0]["bytes"] = shard.stat().st_size
    (tmp_path / "out/manifest.json").write_text(json.dumps(name))
    (tmp_path / "out/train/index.npz").unlink()
    assert size
    with pytest.raises(UserError, match=r"member 'a\.pyd': '\.pyd' files are not allowed"):
        ShardSet.open(tmp_path / "out")
    assert not trap.exists()


def test_links_out_of_a_folder(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 3, splits=("train",))
    (tmp_path / "secret.txt").write_text("secret")
    (src / "train/leak.txt").symlink_to(tmp_path / "secret.txt")
    report = pack(src, tmp_path / "out", max_bad=1.0, incomplete="keep", progress=False)
    assert report.quarantined == 1 and report.samples == {"train": 3}
    assert "leads out of the folder" in quarantine(tmp_path / "out/quarantine.jsonl")[0]["reason"]


def test_names_with_dots_blanks_and_unicode(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    names = ["photo.v1", "photo", "photo v2", "Photo", "größe", "new\nline", "漢字" * 20]
    for name in names:
        (src / f"{name}.png").write_bytes(png())
        (src / f"{name}.txt").write_text(name)
    (src / "two.png").write_bytes(png())
    (src / "two.jpg").write_bytes(png())
    (src / "two.txt").write_text("two")
    report = pack(src, tmp_path / "out", max_bad=0.2, progress=False)
    assert report.samples == {"train": len(names)} and report.quarantined == 1
    shards = ShardSet.open(tmp_path / "out")
    assert sorted(shards[i].values["text"] for i in range(len(shards))) == sorted(names)
    (row,) = quarantine(tmp_path / "out/quarantine.jsonl")
    assert row["reason"] == "two image files of one name: 'two.jpg' and 'two.png'; rename one"


def test_a_file_is_stored_under_its_true_format(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "a.jpg").write_bytes(png())
    pack(src, tmp_path / "out", progress=False)
    assert ShardSet.open(tmp_path / "out").raw(0, "image") == ("png", png())


# ---- damaged shards --------------------------------------------------------------------------


def test_verify_names_the_shard_of_a_flipped_byte(tmp_path: Path) -> None:
    pack(folder(tmp_path / "src", 8), tmp_path / "out", shard_mb=0.01, progress=False)
    assert verify(tmp_path / "out") == {
        "path": str(tmp_path / "out"),
        "ok": True,
        "shards": 8,
        "samples": 16,
        "problems": [],
        "bytes": sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.tar")),
    }
    shard = tmp_path / "out/test/shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    found = verify(tmp_path / "out")
    assert not found["ok"] and len(found["problems"]) == 1
    assert "test/shard-000001.tar: its SHA-256" in found["problems"][0]


def test_shards_cut_on_a_member_border_are_noticed(tmp_path: Path) -> None:
    pack(folder(tmp_path / "src", 8), tmp_path / "out", progress=False)
    shard = tmp_path / "out/train/shard-000000.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:2048])
    with pytest.raises(
        UserError,
        match=r"shard-000000\.tar: has 2048 bytes, the manifest says \d+; restore it or pack again",
    ):
        ShardSet.open(tmp_path / "out")
    problems = verify(tmp_path / "out")["problems"]
    assert any("2048 bytes" in p for p in problems) and any(
        "the manifest says 8" in p for p in problems
    )
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        ShardSet.open(tmp_path / "out")
    shard.write_bytes(good)
    index = tmp_path / "out/train/index.npz"
    before = [ShardSet.open(tmp_path / "out")[i].values["text"] for i in range(8)]
    index.write_bytes(b"damaged")
    again = ShardSet.open(tmp_path / "out")
    assert [again[i].values["text"] for i in range(8)] == before, "a lost index is rebuilt"
    assert again.lengths("audio").tolist() == [400] * 8
    (tmp_path / "out/train/extra.tar").write_bytes(good)
    assert any("extra.tar: not in the manifest" in p for p in verify(tmp_path / "out")["problems"])


def test_foreign_shards_are_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    tar_of(
        tmp_path / "wds/train-000.tar",
        [("a.txt", b"a"), ("a.png", png()), ("b.txt", b"b"), ("b.png", png(1))],
    )
    tar_of(tmp_path / "wds/val-000.tar", [("c.txt", b"c"), ("c.png", png(2))])
    with pytest.raises(UserError, match=f"foreign shards.*: mm data pack {tmp_path / 'wds'} --out"):
        ShardSet.open(tmp_path / "wds")
    assert pack(tmp_path / "wds", tmp_path / "out", progress=False).samples == {
        "train": 2,
        "val": 1,
    }
    with pytest.raises(UserError, match="no packed data at .*make it with: mm data pack"):
        ShardSet.open(tmp_path / "nowhere")
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a shard manifest"):
        ShardSet.open(tmp_path / "out")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    token_shards(tmp_path, 6)
    path = tmp_path / "tokens/vocabulary.json"
    text = path.read_text()
    path.write_text(text.replace("toy-text", "toy-test"))
    with pytest.raises(UserError, match="does not match its own hash"):
        ShardSet.open(tmp_path / "tokens")
    path.write_text(text)
    from mm.vocabulary import Vocabulary

    Vocabulary().save(path)
    with pytest.raises(UserError, match="is not the vocabulary these shards were made with"):
        ShardSet.open(tmp_path / "tokens")
    assert not verify(tmp_path / "tokens")["ok"]
