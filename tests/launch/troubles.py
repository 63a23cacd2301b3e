"""Twelve faults of a set-up, each made for real on one of two machines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from machines import PATH, ROOT, Hosts

# All of the first version's folders, without what tests leave behind.
CODE = ("mm", "tokenizers", "data", "kernels", "launch", "configs")


class Place(NamedTuple):
    """Where a fault is made: machines, the folder that runs are written to, the data."""

    hosts: Hosts
    out: Path
    tokens: Path
    code: Path  # a checkout that the machines run
    environ: dict[str, str]  # of the `mm` that is run

    @property
    def second(self) -> str:
        return self.hosts.names[1]


@contextmanager
def wrong_port(place: Place) -> Iterator[None]:
    """Another program listens on the port."""
    where = ["ip", "netns", "exec", place.hosts.names[0]]
    code = "import socket, time; s = socket.create_server(('', 29500)); print(1, flush=True); time.sleep(600)"  # noqa: E501
    child = subprocess.Popen(
        [*where, sys.executable, "-c", code], stdout=subprocess.PIPE, env={"PATH": PATH}
    )
    try:
        assert child.stdout is not None and child.stdout.readline()
        yield
    finally:
        child.kill()
        child.wait()


@contextmanager
def blocked_port(place: Place) -> Iterator[None]:
    """A firewall drops what comes to the port."""
    nft = lambda *words: place.hosts.inside(place.hosts.names[0], "nft", *words)
    nft("add", "table", "inet", "mm")
    nft("add", "chain", "inet", "mm", "in", "{ type filter hook input priority 0 ; }")
    nft("add", "rule", "inet", "mm", "in", "tcp", "dport", "29500", "drop")
    try:
        yield
    finally:
        nft("delete", "table", "inet", "mm")


@contextmanager
def wrong_interface(place: Place) -> Iterator[None]:
    """Gloo is told to take an interface that leads elsewhere."""
    for name in place.hosts.names:
        place.hosts.inside(name, "ip", "link", "add", "eth9", "type", "veth", "peer", "name", "x9")
        place.hosts.inside(name, "ip", "addr", "add", "10.199.0.1/24", "dev", "eth9")
        place.hosts.inside(name, "ip", "link", "set", "eth9", "up")
    place.environ["GLOO_SOCKET_IFNAME"] = "eth9"
    try:
        yield
    finally:
        del place.environ["GLOO_SOCKET_IFNAME"]
        for name in place.hosts.names:
            place.hosts.inside(name, "ip", "link", "del", "eth9")


@contextmanager
def late_clock(place: Place) -> Iterator[None]:
    """The clock of one machine is a minute ahead."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    place.hosts.serve(place.second, LD_PRELOAD=str(library), FAKETIME="+60s")
    try:
        yield
    finally:
        place.hosts.serve(place.second)


@contextmanager
def old_code(place: Place) -> Iterator[None]:
    """One machine has the commit before."""
    old = place.hosts.folder / "old"
    subprocess.run(["cp", "-a", str(place.code), str(old)], check=True)
    git(old, "checkout", "-q", "HEAD~1")
    with mounted(place, "--bind", str(old), str(place.code)):
        yield


@contextmanager
def other_manifest(place: Place) -> Iterator[None]:
    """One machine has the data of another packing."""
    old = place.hosts.folder / "tokens"
    subprocess.run(["cp", "-a", str(place.tokens), str(old)], check=True)
    manifest = old / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"version"', '"of": "yesterday", "version"', 1)
    )
    with mounted(place, "--bind", str(old), str(place.tokens)):
        yield


@contextmanager
def full_disk(place: Place) -> Iterator[None]:
    """No room is left where one machine writes runs."""
    with mounted(place, "-t", "tmpfs", "-o", "size=256k", "full", str(place.out)):
        yield


@contextmanager
def unwritable_folder(place: Place) -> Iterator[None]:
    """One machine may only read the folder of runs."""
    with mounted(place, "--bind", str(place.out), str(place.out)):
        place.hosts.inside(place.second, "mount", "-o", "remount,bind,ro", str(place.out))
        yield


@contextmanager
def missing_gpu(place: Place) -> Iterator[None]:
    """The driver of one machine shows one GPU, of the other two: a stand-in, none is here."""
    for name, count in zip(place.hosts.names, (2, 1), strict=True):
        program = place.hosts.folder / f"bin_{name}" / "nvidia-smi"
        program.parent.mkdir()
        lines = "".join(f"{i}, NVIDIA H100 80GB HBM3, 570.1, 81559, 4, 0\n" for i in range(count))
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
        program.chmod(0o755)
        place.hosts.serve(name, PATH=f"{program.parent}:/usr/bin:/bin")
    place.hosts.hostfile(slots=2)
    try:
        yield
    finally:
        place.hosts.hostfile()
        for name in place.hosts.names:
            place.hosts.serve(name)


@contextmanager
def slow_link(place: Place) -> Iterator[None]:
    """One machine's interface sends 50 Mbit a second."""
    shape = ("rate", "50mbit", "burst", "32kbit", "latency", "50ms")
    place.hosts.inside(place.second, "tc", "qdisc", "add", "dev", "eth7", "root", "tbf", *shape)
    yield  # the command that mends it takes it away


@contextmanager
def dead_host(place: Place) -> Iterator[None]:
    """One machine's network is gone."""
    place.hosts.inside(place.second, "ip", "link", "set", "eth7", "down")
    try:
        yield
    finally:
        place.hosts.inside(place.second, "ip", "link", "set", "eth7", "up")


@contextmanager
def missing_secret(place: Place) -> Iterator[None]:
    """The run is to be seen online, and nobody has a key."""
    key = place.environ.pop("WANDB_API_KEY")
    try:
        yield
    finally:
        place.environ["WANDB_API_KEY"] = key


@contextmanager
def mounted(place: Place, *words: str) -> Iterator[None]:
    """A mount that the second machine alone has."""
    place.hosts.inside(place.second, "mount", *words)
    try:
        yield
    finally:
        place.hosts.inside(place.second, "umount", words[-1])


def git(folder: Path, *words: str) -> None:
    """Run git in a folder."""
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def checkout(folder: Path) -> Path:
    """A repository of its own with the code of this tree, two commits old."""
    folder.mkdir()
    for name in CODE:
        subprocess.run(["cp", "-a", str(ROOT / name), str(folder / name)], check=True)
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "-q")
    marker = folder / "launch" / "age.py"
    for text in ("one", "two"):
        marker.write_text(f'"""Version {text} of the test."""\n')
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", text)
    return folder


# Name of the fault -> how it is made, the check that must name it, and a word that it must say.
TROUBLES: dict[str, tuple[Callable[[Place], object], str, str]] = {
    "wrong port": (wrong_port, "rendezvous", "port 29500: Address already in use (by process"),
    "blocked port": (blocked_port, "rendezvous", "no answer in 3 s; others answer"),
    "wrong interface": (wrong_interface, "interface", "which does not lead to the first host"),
    "clock off by a minute": (late_clock, "clock", "60.0 s ahead of the others"),
    "old code": (old_code, "code", "1 files differ from"),
    "other manifest": (other_manifest, "data", "others"),
    "full disk": (full_disk, "folder", "No space left on device"),
    "unwritable folder": (unwritable_folder, "folder", "Read-only file system"),
    "missing GPU": (missing_gpu, "gpus", "1 GPUs, 2 processes"),
    "slow link": (slow_link, "link", "eth7 is slowed by a queue (tbf)"),
    "dead host": (dead_host, "host", ""),
    "missing secret": (missing_secret, "secrets", "no key for W&B"),
}
