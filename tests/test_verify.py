"""`mm verify`: agrees where the setting is right, names what is wrong where it is not."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trainer_toys as toys
from trainer_runs import HERE, make_run
from trainer_toys import toys_registered  # noqa: F401

from mm import config as configs
from mm.cli import main
from mm.errors import UserError
from mm.launch.environment import free_port
from mm.registry import NETWORKS, STREAMS
from mm.verify import group as group_of
from mm.verify import verify as judge
from mm.verify.group import Group
from mm.verify.record import rows_of
from mm.verify.tolerance import rounding

IMPORTS = ("trainer_toys", "verify_faults")


@pytest.fixture(autouse=True, scope="module")
def _faults_forgotten() -> Iterator[None]:
    """Take the plug-ins of `verify_faults` out again: no other law is to run over them."""
    yield
    for registry, kind in ((NETWORKS, "summed_lm"), (NETWORKS, "twice_lm"), (STREAMS, "same_rows")):
        registry._modules.pop(kind, None)
        registry._classes.pop(kind, None)


def rows(rank: int, world: int) -> list[str]:
    """Digests of the rows of the first step that one of ``world`` processes reads."""
    words = toys.vocabulary()
    stream = toys.ToyStream(toys.ToyStreamConfig(micro=2), words, 0, rank, world)
    return [row for batch in stream.next() for row in rows_of(batch)]


def facts(rows_: list[str], change: float = 0.0, loss: float = 1.0) -> dict[str, Any]:
    """One step as the runs tell it; ``change``: of the gradient of the second parameter."""
    gradients = [("model.a", 1e-8, 1e-5), ("model.b", change, 1e-5)]
    updates = [("model.a", 0.0, 1e-5), ("model.b", 0.0, 1e-5)]
    judged = {"gradients": gradients, "updates": updates, "allowed": {"model": 1e-5}}
    return {"rows": rows_, "losses": {"loss/total": loss}, **judged}


def test_rows_of_two_processes_are_those_of_one_whatever_the_micro_batches() -> None:
    one, two = rows(0, 1), rows(0, 2) + rows(1, 2)
    assert len(one) == 8 and one == two and len(set(one)) == 8
    assert judge._data([("1", facts(two), facts(one))]).agrees


def test_rows_that_two_processes_read_are_found() -> None:
    twice = rows(0, 2) + rows(0, 2)
    found = judge._data([("1", facts(twice), facts(rows(0, 1)))])
    assert not found.agrees
    assert "step 1: 4 of 8 rows missing, 4 read twice" in found.found


@pytest.mark.parametrize("change", [1e-4, math.inf, math.nan])
def test_the_first_parameter_that_differs_is_named(change: float) -> None:
    good, bad = facts([]), facts([], change)
    assert judge._worst("gradients", [("1", good, good)]).agrees
    found = judge._worst("gradients", [("1", good, good), ("2", good, bad), ("3", good, bad)])
    assert not found.agrees and found.found.startswith("first: model.b at step 2")
    assert judge._worst("updates", [("1", good, bad)]).agrees


@pytest.mark.parametrize("loss", [1.001, math.nan])
def test_a_loss_that_differs_is_named(loss: float) -> None:
    good = facts([])
    assert judge._losses([("1", good, good)]).agrees
    found = judge._losses([("1", facts([], loss=loss), good)])
    assert not found.agrees and found.found.startswith("first: loss/total at step 1")


def test_a_wrong_factor_is_over_what_any_precision_allows() -> None:
    """A rank of 8 left out of a mean, in a model of 12 layers of 7 matrices and 1 M tokens."""
    assert rounding("fp32", 2**20, 84) < rounding("bf16", 2**20, 84) < 1 / 8
    assert rounding("fp32", 100, 4) < 1e-5


def test_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need two"):
        judge.verify(make_run(tmp_path, steps=1), 2)


def verified(tmp_path: Path, capfd: Any, *words: str, **change: Any) -> tuple[int, Any, str]:
    """Exit code, JSON and standard error of the command on a run of the toys."""
    run = make_run(tmp_path, **change).model_copy(update={"imports": IMPORTS})
    file = tmp_path / "run.yaml"
    file.write_text(configs.dump(run))
    code = main.run(["verify", str(file), *words, "--json", str(tmp_path / "out.json")])
    assert not run.folder.exists()
    told = tmp_path / "out.json"
    return code, json.loads(told.read_text()) if told.is_file() else None, capfd.readouterr().err


def together(
    tmp_path: Path, trains: list[Callable[[Callable[[], bool]], str]]
) -> tuple[list[str], list[int], list[list[str]]]:
    """Two roles in a group: what rank 0 hears of each, exit codes of the others, ports met at.

    Args:
        trains: of every rank: what its process does, told when it is over.
    """
    from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

    store, world = HashStore(), len(trains)
    ports: list[list[str]] = [[] for _ in trains]

    def group(rank: int) -> Group:
        def train(role: str, root: Path, environ: Mapping[str, str], poll: Any) -> str:
            assert (root / f"{role}.yaml").exists()
            ports[rank].append(environ["MASTER_PORT"])
            return trains[rank](poll)

        return Group(store, rank, world, train)

    with ThreadPoolExecutor(world) as pool:
        others = [pool.submit(group(rank).follow) for rank in range(1, world)]
        first, heard = group(0), []
        for role in ("setting", "resumed"):
            (tmp_path / f"{role}.yaml").touch()
            heard.append(first.run(role, tmp_path, lambda: False))
        first.end(2 if any(heard) else 0)
        return heard, [other.result(20) for other in others], ports


def well(poll: Callable[[], bool]) -> str:
    return ""


def until_over(poll: Callable[[], bool]) -> str:
    end = time.monotonic() + 20
    while not poll():
        assert time.monotonic() < end
        time.sleep(0.01)
    return "ended by signal 15"


def test_ranks_of_a_launcher_train_the_same_role_at_one_port(tmp_path: Path) -> None:
    heard, codes, ports = together(tmp_path, [well, well, well])
    assert heard == ["", ""] and codes == [0, 0]
    assert ports[0] == ports[1] == ports[2] and len(ports[0]) == 2


def test_a_rank_that_fails_ends_the_others_and_is_told(tmp_path: Path) -> None:
    heard, codes, _ = together(tmp_path, [until_over, until_over, lambda poll: "rank 2: no"])
    assert heard == ["rank 2: no"] * 2 and codes == [2, 2]


def test_a_rank_that_does_not_see_the_folder_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_of, "FOLDER_S", 0.1)
    monkeypatch.setattr(Group, "_see", lambda self, file: see(self, file / "not" / "there"))
    heard, codes, ports = together(tmp_path, [until_over, well])
    assert heard[0].startswith("rank 1 on ") and "must be on a disk that all" in heard[0]
    assert codes == [2] and not ports[1]


see = Group._see


def test_another_number_than_the_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group_of.join(3, judge.train_rank) is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--processes 3: the launcher started 4"):
        group_of.join(3, judge.train_rank)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["toy_lm", "summed_lm"])
def test_under_torchrun_its_ranks_are_verified(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path, stage=2).model_copy(update={"imports": IMPORTS})
    (tmp_path / "run.yaml").write_text(configs.dump(run))
    path = os.pathsep.join((str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    words += [f"--master_port={free_port()}", "-m", "mm", "verify", str(tmp_path / "run.yaml")]
    words += ["--json", str(tmp_path / "out.json"), f"model.kind={kind}"]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=HERE.parent)
    told = json.loads((tmp_path / "out.json").read_text())
    failed = [c["name"] for c in told["checks"] if not c["agrees"]]
    right = kind != "summed_lm"
    assert (done.returncode == 0) == right and told["processes"] == 2, done.stderr
    assert failed == ([] if right else ["gradient of every parameter"])
    assert not run.folder.exists() and not [*tmp_path.rglob("mm-verify-*")]


def lines_of(folder: Path) -> dict[int, str]:
    """Command lines, by process, that name a folder."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"{folder}/mm-verify-" in line:
                found[int(file.parent.name)] = line
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.timeout(180)
def test_sigterm_leaves_neither_processes_nor_a_folder(tmp_path: Path) -> None:
    """Sent once the launcher and both of its processes are there."""
    run = make_run(tmp_path).model_copy(update={"imports": IMPORTS})
    (tmp_path / "run.yaml").write_text(configs.dump(run))
    path = os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", "")))
    words = [sys.executable, "-m", "mm", "verify", str(tmp_path / "run.yaml"), "--processes", "2"]
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": path}
    child = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL, cwd=HERE.parent)
    try:
        until = time.monotonic() + 120
        while len(lines_of(tmp_path)) < 3:
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
        until = time.monotonic() + 10
        while (left := lines_of(tmp_path)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left and not [*tmp_path.glob("mm-verify-*")]
    finally:
        for number in (child.pid, *lines_of(tmp_path)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        child.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_setting_that_is_right_agrees(tmp_path: Path, capfd: Any) -> None:
    code, told, said = verified(tmp_path, capfd, stage=3, engine={"precision": "bf16"})
    assert code == 0 and told["agrees"], (told, said)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sum_in_place_of_a_mean_is_found(tmp_path: Path, capfd: Any) -> None:
    words = ("model.kind=summed_lm",)
    code, told, said = verified(tmp_path, capfd, *words, stage=2)
    failed = {c["name"]: c["found"] for c in told["checks"] if not c["agrees"]}
    assert code == 2 and set(failed) == {"gradient of every parameter"}
    assert failed["gradient of every parameter"].startswith("first: model.down.weight at step 1")
    assert said.count("mm: ") == 1 and "model.down.weight" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_read_twice_are_found(tmp_path: Path, capfd: Any) -> None:
    code, told, _ = verified(tmp_path, capfd, "stages.0.data.kind=same_rows")
    failed = [c["name"] for c in told["checks"] if not c["agrees"]]
    assert code == 2 and failed[0] == "rows of data"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_data_that_are_not_there_are_named(tmp_path: Path, capfd: Any) -> None:
    sources = [{"path": str(tmp_path / "nowhere")}]
    code, told, said = verified(tmp_path, capfd, data={"kind": "packed", "sources": sources})
    assert code == 2 and told is None and said.count("mm: ") == 1 and "nowhere" in said
