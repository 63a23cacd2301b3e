"""Twelve faults on two real machines: `mm doctor --nodes` names each, and its command mends it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import start_toys
from machines import Hosts, environment, mm, need, need_namespaces
from troubles import TROUBLES, Place, checkout

from mm import config as configs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two machines, a run with real token shards, and a checkout that the machines share."""
    need("ip", "ssh", "sshd", "nft", "faketime", "tc")
    need_namespaces()
    root = tmp_path_factory.mktemp("preflight")
    start_toys.packed(root)
    run = start_toys.make_run(
        root, root / "out", data={"batch_size": 4}, tracking={"mode": "online"}
    )
    (root / "run.yaml").write_text(configs.dump(run))
    (root / "out").mkdir()
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.up()
        made.hostfile()
        code = checkout(root / "code")
        keys = {"WANDB_API_KEY": "k" * 40}
        yield Place(made, root / "out", root / "tokens", code, keys)
    finally:
        made.down()


def doctor(place: Place, *more: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the preflight: exit code, rows, and what it printed."""
    root = place.out.parent
    file = root / "doctor.json"
    file.unlink(missing_ok=True)
    words = ["doctor", "--nodes", str(place.hosts.folder / "hostfile"), str(root / "run.yaml")]
    words += [f"cluster.options={place.hosts.options}", *more, "--json", str(file)]
    env = {"PYTHONPATH": str(place.code), "WANDB_MODE": "online"} | place.environ
    code, said = mm(*words, cwd=root, timeout_s=150, **env)
    assert file.exists(), said
    values = json.loads(file.read_text())
    return code, values["rows"], f"{said}\n{values['seconds']:.1f} s"


def test_two_sound_hosts_pass(place: Place, capsys: Any) -> None:
    code, rows, said = doctor(place)
    assert code == 0 and {row["light"] for row in rows} <= {"OK", "WARN"}, said
    checks = {row["check"] for row in rows}
    assert {"clock", "code", "packages", "config", "data", "folder", "collectives"} <= checks
    seconds = float(said.split()[-2])
    with capsys.disabled():
        print(f"\npreflight of two hosts: {seconds:.1f} s")
    left = [p for p in place.out.parent.rglob(".mm-preflight-*")]
    assert not left and place.out.is_dir()  # it was there, empty
    assert place.hosts.addresses[0] in said


@pytest.mark.parametrize("name", TROUBLES)
def test_a_fault_is_named_and_its_command_mends_it(place: Place, name: str) -> None:
    make, check, word = TROUBLES[name]
    with make(place):  # type: ignore[attr-defined]
        code, rows, said = doctor(place)
        found = [row for row in rows if row["light"] == "FIX"]
        assert code == 2 and {row["check"] for row in found} == {check}, said
        assert any(word in row["found"] for row in found), said
        if name == "clock off by a minute":  # its command sets the clock, which all machines share
            assert (
                "timedatectl set-ntp true" in found[0]["mend"] and place.hosts.addresses[1] in said
            )
            return
        more = []
        for mend in dict.fromkeys(row["mend"] for row in found):
            if mend.split("=")[0].replace("_", "").replace(".", "").isidentifier():
                more.append(mend)  # an override
                continue
            done = subprocess.run(
                mend, shell=True, capture_output=True, text=True, env=environment()
            )
            assert done.returncode == 0, f"{mend}: {done.stderr}"
        code, rows, said = doctor(place, *more)
        assert code == 0, f"after {mend}: {said}"
