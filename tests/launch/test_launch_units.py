"""Hostfiles, forwarded variables, schedulers' variables, the batch and the console: no machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.errors import UserError
from mm.launch import allocation, forward
from mm.launch.console import Console
from mm.launch.hostfile import parse_hostfile, select


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb slot=2\n", "hostfile:2: 'b slot=2' is not of the form"),
        ("# one\n\na slots=0\n", "hostfile:3: slots=0"),
        ("a slots=1\r\na slots=2\r\n", "hostfile:2: 'a' stands in line 1 already"),
        ("-oProxyCommand=x slots=1\n", "hostfile:1: "),
        ("# none\n", "hostfile: names no host"),
    ],
)
def test_a_wrong_hostfile_names_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_hostfile(text)
    assert str(error.value).startswith(message)


def test_hosts_are_taken_in_and_left_out() -> None:
    hosts = parse_hostfile("a slots=3 # first\nme@b slots=2\n")
    chosen = lambda **kw: [(h.name, h.slots) for h in select(hosts, **kw)]
    assert chosen() == [("a", (0, 1, 2)), ("me@b", (0, 1))]
    assert chosen(include="a:0,2") == [("a", (0, 2))]
    assert chosen(exclude="a:0") == [("a", (1, 2)), ("me@b", (0, 1))]
    for bad in ({"include": "c"}, {"include": "a:7"}, {"include": "a", "exclude": "a"}):
        with pytest.raises(UserError):
            select(hosts, **bad)


def test_only_the_allow_list_travels_and_secrets_are_masked() -> None:
    given = {"WANDB_API_KEY": "s", "NCCL_DEBUG": "INFO", "HOME": "/x", "MINE_A": "1"}
    found = forward.variables_to_forward(("MINE_",), given)
    assert found == {"MINE_A": "1", "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "s"}
    assert forward.mask_secrets(found)["WANDB_API_KEY"] == "***"
    assert "WANDB_API_KEY" not in forward.public(found)


def test_schedulers_are_understood() -> None:
    sky = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    node = allocation.node(sky)
    assert node is not None and (node.nodes, node.rank, node.address) == (2, 1, "10.0.0.1")
    mpi = {f"OMPI_COMM_WORLD_{k}": v for k, v in (("RANK", "3"), ("SIZE", "4"))}
    mpi |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(UserError, match="MASTER_ADDR"):
        allocation.adopt_ranks(dict(mpi))
    mpi["MASTER_ADDR"] = "10.0.0.1"
    assert allocation.adopt_ranks(mpi) == "Open MPI"
    assert (mpi["RANK"], mpi["WORLD_SIZE"], mpi["LOCAL_RANK"]) == ("3", "4", "1")
    assert allocation.expand_hosts("n[08-10,12],x") == ["n08", "n09", "n10", "n12", "x"]


def test_of_all_errors_the_first_cause_is_told() -> None:
    lines: list[str] = []
    console = Console(lines.append, 1)
    for rank, end in ((1, "RuntimeError: Connection closed by peer"), (0, "ValueError: mine")):
        console.feed("a", f"[rank {rank}] Traceback (most recent call last):")
        console.feed("a", f"[rank {rank}] {end}")
    console.feed("a", "[rank 2] fine")
    said = console.first_error()
    assert said is not None and said.rank == "0" and lines == ["[rank 2] fine"]


def test_the_first_host_is_never_this_machine_by_mistake(tmp_path: Path) -> None:
    from mm.launch.ssh import first_address

    hosts = parse_hostfile("localhost slots=1\n10.0.0.2 slots=1\n")
    with pytest.raises(UserError, match="no other host reaches"):
        first_address(hosts, tmp_path / "hostfile")
