"""Every check of the preflight by hand: what nodes might see, and the row that must come of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from mm.launch.preflight import collective, machine, network, software
from mm.launch.preflight.agent import answer
from mm.launch.preflight.check import FIX, OK, WARN, Asked, Endpoint, Row, Seen, common
from mm.launch.preflight.checks import CHECKS, judge
from mm.launch.source import hash_files

HOSTS = tuple(Endpoint(n, ("ssh", "-o", "X=y", n, "bash -s"), 2) for n in ("a", "b", "c"))


def seen(skew: dict[int, float] | None = None, **steps: list[dict[int, Any]]) -> Seen:
    return Seen(HOSTS, steps, skew or {})


def to_mend(rows: Any) -> list[Row]:
    return [row for row in rows if row.light == FIX]


def test_a_clock_is_held_against_the_middle_of_all() -> None:
    rows = list(machine.judge_clock(seen({0: 0.1, 1: 60.2, 2: 0.0})))
    assert [(r.host, r.light) for r in rows] == [("b", FIX)] and "60.2 s ahead" in rows[0].found
    assert rows[0].mend.startswith("ssh -o X=y b ") and "set-ntp" in rows[0].mend
    rows = list(machine.judge_clock(seen({0: -30.0, 1: -30.1, 2: -29.9})))
    assert [(r.host, r.light) for r in rows if r.light != OK] == [("this machine", WARN)]


def test_code_that_differs_is_named_by_file_and_commit() -> None:
    code = lambda commit, **files: {"root": "/r", "commit": commit, "files": files}
    found = {0: code("aaaa", x="1"), 1: code("bbbb", x="2"), 2: code("aaaa", x="1")}
    (row,) = to_mend(software.judge_code(seen(code=[found])))
    assert row.host == "b" and "commit bbbb, others aaaa; 1 files differ from a's: x" in row.found
    assert "git -C /r checkout -q aaaa" in row.mend
    found[1] = code("aaaa+", x="1", y="3")
    (row,) = to_mend(software.judge_code(seen(code=[found])))
    assert (
        row.mend.startswith("ssh -o X=y a 'tar -C /r -chf - mm ") and " | ssh -o X=y b " in row.mend
    )
    found[1] = found[0]
    assert [r.light for r in software.judge_code(seen(code=[found]))] == [OK]


def test_other_versions_get_the_command_that_installs_the_common_ones() -> None:
    have = {"python": "3.11.7", "executable": "/v/python", "torch": "2.14.1"}
    found = {0: have, 1: have | {"torch": "2.13.0"}, 2: have}
    (row,) = to_mend(software.judge_packages(seen(packages=[found])))
    assert row.host == "b" and row.found == "torch 2.13.0, others 2.14.1"
    assert row.mend == "ssh -o X=y b '/v/python -m pip install torch==2.14.1'"


def test_data_of_another_packing_is_copied_from_a_host_that_has_the_common_one() -> None:
    read = lambda digest: {"config": "c", "inputs": {"/d": digest}, "online": True}
    found = {0: read("1" * 64), 1: read("1" * 64), 2: read("missing")}
    (row,) = to_mend(software.judge_data(seen(config=[found])))
    assert row.host == "c" and row.found == "/d: missing"
    assert row.mend.startswith("ssh -o X=y a 'tar -C /d") and " | ssh -o X=y c 'mkdir" in row.mend
    everywhere = {i: read("missing") for i in range(3)}
    (row,) = to_mend(software.judge_data(seen(config=[everywhere])))
    assert row.host == "all" and "mm data pack" in row.mend
    found[2] = {"wrong": "run.yaml: no such file", "is_there": False}
    (row,) = to_mend(software.judge_config(seen(config=[found])))
    assert (row.host, row.found) == ("c", "run.yaml: no such file")


def test_a_secret_is_asked_for_only_where_it_is_needed() -> None:
    for online, key, light in ((True, False, FIX), (True, True, OK), (False, False, OK)):
        config = [{0: {"online": online}}]
        (row,) = machine.judge_secrets(seen(config=config, secrets=[{0: {"wandb": key}}]))
        assert row.light == light
    assert FIX in {
        r.light
        for r in machine.judge_secrets(
            seen(config=[{0: {"online": True}}], secrets=[{0: {"wandb": False}}])
        )
    }


def gpus(n: int, **change: str) -> dict[str, Any]:
    one = {"name": "H100", "driver_version": "570", "memory.total": "80000", "memory.used": "5"}
    rows = [one | {"index": str(i), "uncorrected": "0"} | change for i in range(n)]
    return {"gpus": rows, "in_driver": n, "why": "", "asked": 2}


@pytest.mark.parametrize(
    ("second", "light", "word", "mend"),
    [
        (gpus(1) | {"in_driver": 2}, FIX, "1 GPUs, 2 processes; 1 lost", "cluster.gpus_per_node=1"),
        (gpus(0), FIX, "0 GPUs, 2 processes", "cluster.exclude=b"),
        (gpus(0) | {"why": "nvidia-smi does not answer"}, FIX, "does not answer", "exclude=b"),
        (gpus(2, uncorrected="3"), FIX, "3 uncorrected errors", "--gpu-reset"),
        (gpus(2, driver_version="550"), WARN, "driver 550, others 570", "nvidia-smi"),
        (gpus(2, **{"memory.used": "70000"}), WARN, "70000 of 80000 MiB", "compute-apps"),
    ],
)
def test_gpus(second: dict[str, Any], light: str, word: str, mend: str) -> None:
    rows = list(machine.judge_gpus(seen(gpus=[{0: gpus(2), 1: second, 2: gpus(2)}])))
    assert {(r.host, r.light) for r in rows} == {("b", light)}
    assert word in rows[0].found and mend in rows[0].mend


def asked(folder: Path, rank: int = 0, **change: Any) -> Asked:
    given = {"address": "127.0.0.1", "port": 1, "processes": 1, "config": None, "overrides": ()}
    return Asked(
        **{"rank": rank, "nodes": 2, "folder": str(folder), "nonce": "n", **given, **change}
    )


def folder_steps(places: list[Path]) -> list[dict[int, Any]]:
    """What the steps of `folder` give on nodes that see these folders as theirs."""
    steps: list[dict[int, Any]] = []
    told: dict[int, Any] = {}
    for step in (machine.write_folder, machine.list_folder, machine.clear_folder):
        told = {i: step(asked(place, i), told) for i, place in enumerate(places)}
        steps.append(told)
    return steps


def test_a_folder_must_be_one_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shared = folder_steps([tmp_path / "one"] * 2)
    assert not to_mend(machine.judge_folder(seen(folder=shared)))
    assert not list(tmp_path.rglob(".mm-preflight*"))
    apart = folder_steps([tmp_path / "one", tmp_path / "two"])
    for i in (0, 1):  # the path is one, the disks are not
        apart[0][i]["folder"] = "/runs"
        apart[1][i]["/runs"] = [i]
    rows = to_mend(machine.judge_folder(seen(folder=apart)))
    assert [row.host for row in rows] == ["a", "b"]
    assert "does not show what b wrote there" in rows[0].found
    assert rows[0].mend == f"out={tmp_path / 'runs'}"  # which both see
    file = tmp_path / "file"
    file.write_text("")
    rows = to_mend(machine.judge_folder(seen(folder=folder_steps([tmp_path / "one", file]))))
    assert [row.host for row in rows] == ["b"] and "Not a directory" in rows[0].found


def test_an_interface_must_lead_to_the_first_host() -> None:
    can = {"all": {"lo": "127.0.0.1", "eth0": "10.0.0.2", "eth1": "10.1.0.2"}, "why": ""}
    good = can | {"named": {}, "leads": "eth0"}
    for name, word in (("eth1", "10.1.0.2, which does not lead"), ("ib0", "not here")):
        bad = good | {"named": {"GLOO_SOCKET_IFNAME": name}}
        (row,) = to_mend(network.judge_interface(seen(interface=[{0: good, 1: bad}])))
        assert word in row.found and row.mend == "cluster.env.GLOO_SOCKET_IFNAME=eth0"
    fine = good | {"named": {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth"}}
    assert not to_mend(network.judge_interface(seen(interface=[{0: fine}])))


def meeting(first: Any = None, second: Any = None, tried: Any = None) -> list[Row]:
    good = {"resolves": ["10.0.0.1"], "listens": "", "spare": [4000, 4001], "own": True}
    said = {0: good | {"network": "x"} | (first or {}), 1: good | {"network": "y"} | (second or {})}
    answers = {0: {}, 1: tried or {"29500": "", "4000": "", "4001": ""}}
    return to_mend(network.judge_rendezvous(seen(rendezvous=[said, answers])))


def test_the_meeting_point_is_never_a_loopback_and_answers() -> None:
    assert meeting() == []
    loop = {"resolves": ["127.0.0.1"], "network": "one machine"}
    assert meeting(first=loop, second=loop) == []
    (row,) = meeting(second={"resolves": ["127.0.1.1"]})
    assert (row.host, row.mend) == ("b", "cluster.address=10.0.0.1") and "loopback" in row.found
    (row,) = meeting(second={"resolves": ["10.9.9.9"]})
    assert "resolves to 10.9.9.9, elsewhere 10.0.0.1" in row.found
    (row,) = meeting(first={"listens": "port 29500: Address already in use"})
    assert (row.host, row.mend) == ("a", "cluster.port=4000")
    (row,) = meeting(tried={"29500": "no answer in 3 s", "4000": "no answer in 3 s", "4001": ""})
    assert (row.host, row.mend) == ("b", "cluster.port=4001")
    (row,) = meeting(tried=dict.fromkeys(("29500", "4000", "4001"), "no answer in 3 s"))
    assert row.mend == "cluster.exclude=b" and "firewall" in row.found


def test_a_port_that_is_taken_names_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        try:
            found = network.listen(asked(tmp_path, port=port), {})
        finally:
            network.close(asked(tmp_path), {})
    assert found["listens"].startswith(
        f"port {port}: Address already in use (by process {os.getpid()}"
    )
    assert len(found["spare"]) == network.SPARE_PORTS


def pairs(slow: dict[tuple[int, int], float], shaped: int | None = None) -> list[Row]:
    rates = {(0, 1): 1e9, (0, 2): 1e9, (1, 2): 1e9} | slow
    links = {i: {"leads": "eth0", "mbit": 10_000, "shaped": ""} for i in range(3)}
    if shaped is not None:
        links[shaped]["shaped"] = "tbf"
    return list(network.slow_pairs(seen(interface=[links]), rates))


def test_the_host_that_slow_pairs_have_in_common_is_named() -> None:
    assert pairs({}) == []
    (row,) = pairs({(0, 1): 2e8, (1, 2): 2e8})
    assert (row.host, row.mend) == ("b", "cluster.exclude=b")
    (row,) = pairs({(0, 2): 1e6}, shaped=0)
    assert row.host == "a" and "tc qdisc del dev eth0 root" in row.mend


def test_wrong_numbers_and_hangs_are_named() -> None:
    fine = {"why": "", "right": True, "backend": "gloo", "all_reduce": 1e9, "all_gather": 1e9}
    fine["pairs"] = []  # type: ignore[assignment]
    found = {0: fine, 1: fine | {"right": False}}
    (row,) = network.judge_collectives(seen(collectives=[found]))
    assert (row.host, row.light) == ("b", FIX) and "wrong numbers" in row.found
    found[1] = {"why": "no end after 60 s"}
    assert [r.host for r in network.judge_collectives(seen(collectives=[found]))] == ["b"]


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_every_pair_meets_once(n: int) -> None:
    rounds = list(collective.rounds(n))
    met = [pair for pairing in rounds for pair in pairing]
    assert len(met) == len(set(met)) == n * (n - 1) // 2
    assert all(len({i for pair in p for i in pair}) == 2 * len(p) for p in rounds)


def test_an_agent_answers_and_a_check_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.time, "time", lambda: 1 / 0)
    words = {"round": 0, "asked": asked(tmp_path).__dict__, "told": {}, "without": ["folder"]}
    said = answer(words)
    assert "folder" not in said and said["clock"] == {
        "error": "ZeroDivisionError: division by zero"
    }
    assert said["code"]["files"] == hash_files() and "launch/preflight/agent.py" in hash_files()
    rows = judge(seen(clock=[{0: said["clock"]}]))
    assert [(r.check, r.host) for r in to_mend(rows)] == [("clock", "a")]


def test_names_of_checks_differ_and_those_needed_exist() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert {need for check in CHECKS for need in check.needs} <= set(names)
    assert common({0: "x", 1: "y", 2: "y"}) == "y" and common({3: "y", 1: "x"}) == "x"
