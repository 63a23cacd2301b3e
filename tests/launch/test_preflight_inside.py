"""The preflight inside a job: nodes of one machine that meet, agree, or are refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machines import environment, toy_run

from mm.launch.environment import free_port
from mm.launch.launcher import Job
from mm.launch.preflight import inside
from mm.launch.preflight.check import Asked


def ports() -> int:
    """A port that is free, as is the one after it."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("", port + 1))
                return port
            except OSError:
                continue


def nodes(
    folder: Path, config: Path, count: int = 2, start: int = 0, wait_s: int = 60, **env: str
) -> list[tuple[int, str]]:
    """Exit code and words of every node from ``start`` on."""
    job = Job(str(config), (f"out={folder}",), "run", folder / "run", {}, folder)
    told: dict[str, Any] = {"nodes": count, "processes": 1, "wait_s": wait_s}
    port = str(ports())
    lines = [
        inside.command(
            sys.executable, job, node_rank=str(i), address="127.0.0.1", port=port, **told
        )
        for i in range(start, count)
    ]
    made = [
        subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(SLURMD_NODENAME=f"n{i}", **(env if i else {})),
            cwd=folder,
        )
        for i, line in enumerate(lines, start)
    ]
    said = [child.communicate(timeout=200)[0] for child in made]
    return [(child.returncode, words) for child, words in zip(made, said, strict=True)]


@pytest.mark.slow
def test_two_nodes_meet_are_fine_and_leave_nothing(tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    (first, said), (second, silent) = nodes(tmp_path, config)
    assert (first, second) == (0, 0), said
    assert "preflight of 2 hosts" in said and "collectives" in said and not silent
    told = json.loads((tmp_path / "run/launch/preflight.json").read_text())
    assert {row["light"] for row in told["rows"]} <= {"OK", "WARN"} and told["hosts"] == 2
    assert not (tmp_path / "run/launch/refused").exists()
    assert not list(tmp_path.rglob(".mm-preflight*"))


@pytest.mark.slow
def test_what_is_to_be_mended_ends_every_node_with_2(tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    found = nodes(tmp_path, config, GLOO_SOCKET_IFNAME="ib9")
    assert [code for code, _ in found] == [2, 2], found
    said = found[0][1]
    assert "GLOO_SOCKET_IFNAME=ib9" in said and "1 to mend" in said and "--no-preflight" in said
    assert "1 to mend" in (tmp_path / "run/launch/refused").read_text()


def test_a_node_that_does_not_come_is_named_and_may_be_tried_again(tmp_path: Path) -> None:
    asked = Asked(0, 2, "127.0.0.1", ports(), 1, None, (), str(tmp_path), "abc")
    code, report = inside.run(asked, "n0", "cluster.exclude={}", wait_s=2)
    assert code == 1 and report is not None
    (row,) = report.to_mend
    assert row.host == "node 1" and "did not come" in row.found
    assert row.mend == "cluster.exclude=node 1"
    inside.note(tmp_path / "home", report, code)
    assert not (tmp_path / "home/refused").exists(), "a retry may find it"


def test_a_first_node_that_is_not_there_is_told(tmp_path: Path) -> None:
    asked = Asked(1, 2, "127.0.0.1", ports(), 1, None, (), str(tmp_path), "abc")
    assert inside.run(asked, "n1", "", wait_s=1) == (None, None)


def test_strangers_at_the_meeting_point_are_no_nodes(tmp_path: Path) -> None:
    port = ports()
    asked = Asked(0, 2, "127.0.0.1", port, 1, None, (), str(tmp_path), "abc")
    driver = inside.Driver(asked, "", 3.0)
    driver.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"node": 1, "name": "x", "nonce": "other"}\n', b"["):
        with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
            stranger.sendall(words)
    driver.join(30)
    assert driver.report is not None and not driver.complete
    assert len([row for row in driver.report.rows if "did not come" in row.found]) == 2
    assert os.listdir(tmp_path) == []
