"""Who is to blame for a hang, when a restart makes no sense, how rows fall on fewer processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm.errors import UserError
from mm.launch import restarts, supervise
from mm.launch.batch import keep_micro_batches
from mm.launch.launcher import Job, Node, Plan
from mm.launch.progress import Progress
from mm.launch.ssh import Ssh
from mm.launch.supervise import Outcome
from mm.run import Run

NODES = (Node("a", (), "", 1), Node("b", (), "", 2))


class Ranks:
    """Heartbeats of three ranks on two nodes, and a clock."""

    def __init__(self, folder: Path):
        self.folder, self.now = folder, 0.0
        (folder / "health").mkdir()
        self.all(0, "start")
        self.progress = Progress(folder, NODES, 40.0, lambda: self.now)

    def say(self, rank: int, step: int, phase: str, pid: int = 0) -> None:
        beat = {"rank": rank, "pid": pid or 100 + rank, "step": step, "phase": phase}
        beat |= {"since": self.now + rank / 1000, "steps": max(0, step - 1)}
        (self.folder / "health" / f"rank_{rank:04d}.json").write_text(json.dumps(beat))

    def all(self, step: int, phase: str) -> None:
        for rank in range(3):
            self.say(rank, step, phase)

    def train(self, steps: int, seconds: float) -> None:
        for step in range(1, steps + 1):
            for phase in ("data", "step", "report"):
                self.all(step, phase)
                self.now += seconds / 3
                assert self.progress.look() is None


def test_a_rank_that_keeps_the_others_waiting_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.train(8, 1.0)
    assert ranks.progress.step == 8
    ranks.all(9, "step")
    ranks.say(1, 9, "data")
    ranks.progress.look()
    ranks.now += 39
    assert ranks.progress.look() is None
    ranks.now += 2
    hang = ranks.progress.look()
    assert hang is not None and (hang.node, hang.rank) == ("b", 1) and "41 s" in hang.why


def test_steps_that_nobody_saw_count_and_first_steps_may_last(tmp_path: Path) -> None:
    """A run may hang before the launcher has looked a second time; it may also compile."""
    ranks = Ranks(tmp_path)
    for step, hangs in ((2, False), (9, True)):
        ranks.all(step, "step")
        assert ranks.progress.look() is None
        ranks.now += 41
        assert (ranks.progress.look() is not None) == hangs


def test_long_steps_and_other_work_are_no_hang(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.train(8, 30.0)  # phases of 10 s: 100 s are waited for
    ranks.now += 95
    assert ranks.progress.look() is None
    ranks.now += 10
    assert ranks.progress.look() is not None
    ranks.all(8, "save")
    ranks.now += 1000
    ranks.progress.look()
    ranks.now += 1000
    assert ranks.progress.look() is None


def test_what_an_attempt_before_left_is_not_heard(tmp_path: Path) -> None:
    Ranks(tmp_path).all(50, "step")
    after = Progress(tmp_path, NODES, 40.0)
    after.look()
    assert after.beats == [] and after.step == 0


def test_a_stopped_process_and_a_silent_node_are_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.train(5, 1.0)
    for state, seconds, found in (("T", 9, "a"), ("S", 9, None)):
        ranks.progress.hear("a", ("100", state))
        ranks.now += seconds
        hang = ranks.progress.look()
        assert (hang and hang.node) == found
    ranks.progress.hear("b", ())
    ranks.train(5, 2.0)
    ranks.progress.hear("a", ())
    ranks.now += 36
    hang = ranks.progress.look()
    assert hang is not None and hang.node == "b" and "not answered for 46 s" in hang.why


def test_of_ranks_in_one_place_the_one_that_waits_for_nobody_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.train(5, 1.0)
    ranks.all(6, "step")
    ranks.progress.look()
    ranks.now += 50
    hang = ranks.progress.look()
    assert hang is not None and hang.rank == 0  # nothing tells them apart yet
    for rank, place in enumerate(("torch/distributed/x.py", "mine.py", "torch/distributed/x.py")):
        text = (
            f'Thread 1:\n  File "t.py", line 1\n\nCurrent thread 2:\n  File "/p/{place}", line 3\n'
        )
        (tmp_path / "health" / f"rank_{rank:04d}.stacks.txt").write_text(text)
    hang = ranks.progress.accuse(hang, tmp_path / "health")
    assert (hang.node, hang.rank) == ("b", 1)


def run_of(rows: int, micro: int | None = None) -> Run:
    data = {"kind": "packed", "sources": [{"path": "t"}], "batch_size": rows}
    data |= {"micro_batch_size": micro} if micro else {}
    stage = {"data": data, "objective": "next_token"}
    return Run.model_validate({"name": "r", "model": {"kind": "lm"}, "stages": [stage]})


@pytest.mark.parametrize(
    ("rows", "micro", "before", "now", "expected"),
    [
        (8, None, 4, 2, 2),
        (8, 2, 2, 1, 2),
        (12, None, 4, 3, 2),  # 4 rows a process: 3 at a time do not divide them
        (12, None, 3, 2, 3),
        (8, None, 2, 2, None),
        (8, None, 2, 4, None),
    ],
)
def test_fewer_processes_take_more_passes_of_no_more_rows(
    rows: int, micro: int | None, before: int, now: int, expected: int | None
) -> None:
    found = keep_micro_batches(run_of(rows, micro), before, now)
    assert found == ([f"stages.0.data.micro_batch_size={expected}"] if expected else [])


class Script:
    """Outcomes of attempts, in place of starting any; remembers who was started."""

    def __init__(self, *outcomes: Outcome):
        self.outcomes, self.started = list(outcomes), []

    def __call__(self, job: Job, nodes: Any, *rest: Any) -> Outcome:
        self.started.append([f"{n.name}:{n.processes}" for n in nodes])
        return self.outcomes.pop(0)


def launch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *outcomes: Outcome,
    dead: tuple[str, ...] = (),
    rows: int = 8,
    **change: Any,
) -> tuple[Outcome, list[list[str]], list[str]]:
    file = tmp_path / "hostfile"
    file.write_text("10.0.0.1 slots=2\n10.0.0.2 slots=2\n10.0.0.3 slots=2\n")
    given = {"kind": "ssh", "hostfile": file, "spares": ("10.0.0.3",)} | change
    launcher = Ssh.model_validate(given)
    monkeypatch.setattr(Ssh, "is_there", lambda self, host: host not in dead)
    monkeypatch.setattr(Ssh, "lease_s", 0.0)
    script = Script(*outcomes)
    monkeypatch.setattr(supervise, "run", script)
    job = Job("run.yaml", (), "r", tmp_path / "run", {}, tmp_path)
    job.home.mkdir(parents=True)
    said: list[str] = []
    plans: list[Plan] = []
    run = run_of(rows)
    outcome = restarts.run(
        launcher, run, job, launcher.plan(job), said.append, lambda job, plan: plans.append(plan)
    )
    return outcome, script.started, said


BAD = Outcome(1, "10.0.0.2: a rank was ended by SIGKILL", "10.0.0.2", 5)
LOST = Outcome(1, "10.0.0.2: the connection is lost", "10.0.0.2", 5)


def test_a_spare_takes_the_place_of_a_dead_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = launch(tmp_path, monkeypatch, LOST, Outcome(0, ""), dead=("10.0.0.2",))
    assert found[0].code == 0
    assert found[1] == [["10.0.0.1:2", "10.0.0.2:2"], ["10.0.0.1:2", "10.0.0.3:2"]]
    first, last = restarts.read_history(tmp_path / "run")
    assert (first["node"], first["steps_lost"], last["code"]) == ("10.0.0.2", 5, 0)


def test_a_node_that_failed_twice_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = BAD._replace(step=9)
    found = launch(tmp_path, monkeypatch, BAD, again, Outcome(0, ""), spares=(), nodes=2)
    assert found[1][1] == ["10.0.0.1:2", "10.0.0.2:2"]  # it is there, so it may try once more
    assert found[1][2] == ["10.0.0.1:2", "10.0.0.3:2"]  # a host of the file that was not asked for


def test_world_sizes_that_do_not_divide_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = ("10.0.0.2",)
    given = {"spares": (), "rows": 9 * 2, "nodes": None}
    found = launch(tmp_path, monkeypatch, LOST, Outcome(0, ""), dead=dead, **given)
    assert found[1][1] == ["10.0.0.1:2", "10.0.0.3:1"]
    assert any("4 processes do not divide the 18 rows of a step: 3 do" in line for line in found[2])


def test_a_restart_that_cannot_help_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Outcome(1, "a rank 0: Traceback (most recent call last):\nValueError: 12 in x", "a", 7)
    other = wrong._replace(why=wrong.why.replace("12", "13").replace("a rank 0", "b rank 3"))
    found = launch(tmp_path, monkeypatch, wrong, other, Outcome(0, ""))
    assert len(found[1]) == 2 and "the same happened at step 7 before" in found[0].why
    (tmp_path / "run" / "launch").rename(tmp_path / "old")
    found = launch(tmp_path, monkeypatch, Outcome(2, "a: config is wrong", "a"), Outcome(0, ""))
    assert len(found[1]) == 1 and found[0].code == 2
    (tmp_path / "run" / "launch").rename(tmp_path / "older")
    many = [wrong._replace(step=i) for i in range(5)]
    found = launch(tmp_path, monkeypatch, *many, restarts=2)
    assert len(found[1]) == 3 and "2 were allowed" in found[0].why


def test_no_host_left_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ("10.0.0.1", "10.0.0.2")
    first = LOST._replace(node="10.0.0.1")
    found = launch(
        tmp_path, monkeypatch, LOST, first, dead=gone, include="10.0.0.1@10.0.0.2", spares=()
    )
    assert found[1] == [["10.0.0.1:2", "10.0.0.2:2"], ["10.0.0.1:2"]]
    assert found[0].code == 1 and "no host is left" in found[0].why


def test_a_spare_must_be_in_the_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="spares: no host 'x'"):
        launch(tmp_path, monkeypatch, spares=("x",))
