"""Files of strangers, damaged at random: taken or refused in one line, never anything else."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from doors import DOORS, Door  # noqa: E402
from guard import Desk, TooSlow, pass_through, warm  # noqa: E402

QUICK = 300  # inputs of the default suite over all doors; `make fuzz` runs 100,000


@pytest.mark.parametrize("name", DOORS)
def test_a_damaged_file_is_taken_or_refused(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    door = DOORS[name]
    seed = tmp_path_factory.mktemp(name)
    door.seed(seed)
    warm(door, seed)
    desk = Desk(seed)

    @settings(
        max_examples=-(-QUICK // len(DOORS)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(edits=st.randoms(use_true_random=False).map(door.draw))
    def check(edits: object) -> None:
        pass_through(door, desk, edits)

    try:
        check()
    finally:
        desk.close()


def test_a_desk_is_as_new_for_every_input(tmp_path: Path) -> None:
    """Whatever was done to it: else one input's damage would be met by the next."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    desk = Desk(tmp_path)
    try:
        for change in (
            lambda f: (f / "c.txt").write_text("d"),  # as long, and at once
            lambda f: (f / "c.txt").unlink(),
            lambda f: (f / "c.txt").rename(f / "a" / "e.txt"),
            lambda f: shutil.rmtree(f / "a"),
            lambda f: (f / "out").mkdir() or (f / "out" / "x").write_text("x"),
            lambda f: (f / "c.txt").unlink() or (f / "c.txt").symlink_to("a"),
            lambda f: (f / "c.txt").unlink() or (f / "c.txt").mkdir(),
            lambda f: shutil.rmtree(f),
        ):
            before = desk.folder
            change(desk.folder / "in")
            (desk.folder / "tmp" / "left").write_text("x")
            desk.renew()
            assert desk.folder != before and not before.exists()
            inside = sorted(str(p.relative_to(desk.folder)) for p in desk.folder.rglob("*"))
            assert inside == ["in", "in/a", "in/a/b.txt", "in/c.txt", "tmp"]
            assert (desk.folder / "in" / "a" / "b.txt").read_text() == "b"
            assert (desk.folder / "in" / "c.txt").read_text() == "c"
    finally:
        desk.close()


@pytest.mark.parametrize(
    "touch",
    (
        lambda out, f: out.write_text("x"),
        lambda out, f: (f / "in" / "c.txt").rename(f.parent / "out.txt"),
        lambda out, f: (f / "in" / "l").symlink_to(out.parent) or (f / "in/l/x").write_text("x"),
        lambda out, f: (f / "in" / ".." / ".." / "x").write_text("x"),
        lambda out, f: os.system("true"),
        lambda out, f: out.exists() or os.listdir(out.parent),
    ),
)
def test_the_guard_sees_what_lies_elsewhere(touch: Any, tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    seed.mkdir()
    (seed / "c.txt").write_text("c")
    desk = Desk(seed)
    out = tmp_path / "out.txt"
    enter = lambda folder: touch(out, folder.parent)
    door = Door(lambda f: None, lambda d: None, lambda f, e: None, enter)
    try:
        with pytest.raises(AssertionError, match="touched what is not its own"):
            pass_through(door, desk, None)
    finally:
        desk.close()


def test_a_door_that_works_or_waits_for_too_long_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.SECONDS", 0.2)
    monkeypatch.setattr("guard.WAIT", 1.0)

    def work(folder: Path) -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    desk = Desk(tmp_path)
    try:
        for enter, limit in ((work, "of work|over 1.0 s"), (lambda f: time.sleep(60), "over 1.0")):
            door = Door(lambda f: None, lambda d: None, lambda f, e: None, enter)
            with pytest.raises(TooSlow, match=limit):
                pass_through(door, desk, None)
    finally:
        desk.close()
