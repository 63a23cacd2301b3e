"""Machines of the launch tests: network namespaces joined by a bridge, each with its own sshd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trainer_runs
import trainer_toys

from mm import config as configs

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "mpirun": "openmpi-bin",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "nft": "nftables",
    "faketime": "faketime",
    "tc": "iproute2",
}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def need(*programs: str) -> None:
    """Skip by name where root or a package is missing; `.ci/run` installs them all."""
    if os.geteuid() != 0:
        pytest.skip("launch machines: needs root")
    for program in programs:
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"launch machines: needs Debian's {PACKAGES[program]}")


def need_namespaces() -> None:
    """Skip by name where this kernel lets root make no network namespace or bridge."""
    name = "mmtestprobe"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"launch: this kernel gives no network namespaces: {error.stderr!r}")
    finally:
        _ip("link", "del", name, check=False)
        _ip("netns", "del", name, check=False)


def toy_run(folder: Path, steps: int = 6, **change: Any) -> Path:
    """A YAML of the trainer's toy run below ``folder``."""
    trainer_toys.register()
    try:
        run = trainer_runs.make_run(folder, steps=steps, **change)
        file = folder / "toy.yaml"
        file.write_text(configs.dump(run.model_copy(update={"imports": ("trainer_toys",)})))
        return file
    finally:
        trainer_toys.forget()


def environment(**more: str) -> dict[str, str]:
    """Of a child `mm`: this source tree, the toys, nothing of an outer job."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PET_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        keep.pop(name, None)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    own = {"PYTHONPATH": path, "PATH": PATH, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return keep | own | more


def mm(*words: str, cwd: Path, timeout_s: float = 300, **env: str) -> tuple[int, str]:
    """Run `mm WORDS`: exit code and all that it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "mm", *words],
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    return done.returncode, done.stdout


@contextmanager
def background(*words: str, cwd: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """`mm WORDS` beside the test; what is left of it is ended."""
    child = subprocess.Popen(
        [sys.executable, "-m", "mm", *words],
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return when ``condition`` is true; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s:.0f} s still waiting for {what}"
        time.sleep(0.1)


def steps_done(folder: Path) -> int:
    """Lines of metrics.jsonl that a run has written."""
    file = folder / "metrics.jsonl"
    return file.read_text().count('"loss/total"') if file.exists() else 0


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, env={"PATH": PATH})


class Hosts:
    """Two machines of their own network: 10.77.0.1 and 10.77.0.2, this one is 10.77.0.254.

    MM_TEST_NET=78 takes another network: two trees test at once on one machine.
    """

    net = int(os.environ.get("MM_TEST_NET", "77"))
    names = (f"mmtest{net}a", f"mmtest{net}b")
    addresses = (f"10.{net}.0.1", f"10.{net}.0.2")
    bridge = f"mmtest{net}br"

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        self.options = (
            f"-i {folder}/key -F none -o UserKnownHostsFile={folder}/known -o BatchMode=yes "
            "-o StrictHostKeyChecking=accept-new -o ConnectTimeout=5 "
            "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"
        )

    def up(self) -> None:
        self.down()
        run = lambda *words: subprocess.run(words, check=True, capture_output=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder}/key")
        shutil.copy(f"{self.folder}/key.pub", f"{self.folder}/authorized")
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"10.{self.net}.0.254/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth7", "netns", name)
            _ip("link", "set", f"{name}v", "master", self.bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth7")
            _ip("-n", name, "link", "set", "eth7", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder}/host_{name}")
            self.serve(name)

    def serve(self, name: str, **environment: str) -> None:
        """Start the machine's sshd, or start it again: its sessions have this environment."""
        if name in self.daemons:
            self.daemons[name].terminate()
            self.daemons[name].wait(10)
        address = self.addresses[self.names.index(name)]
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        # no start-up files of this machine's user: they take their time, and may wait for a lock
        given = {"HOME": str(self.folder), "XDG_CACHE_HOME": cache} | environment
        config = self.folder / f"sshd_{name}"
        config.write_text(
            f"HostKey {self.folder}/host_{name}\nPidFile {self.folder}/pid_{name}\n"
            f"ListenAddress {address}\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"AuthorizedKeysFile {self.folder}/authorized\nStrictModes no\nUsePAM no\n"
            f"MaxStartups 50\nSetEnv {' '.join(f'{k}={v}' for k, v in given.items())}\n"
        )
        command = ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", str(config)]
        with (self.folder / f"log_{name}").open("a") as log:
            self.daemons[name] = subprocess.Popen(command, stderr=log, env={"PATH": PATH})
        answers = lambda: (
            subprocess.run(
                ["ssh", *self.options.split(), address, "true"], capture_output=True
            ).returncode
            == 0
        )
        wait_for(answers, 20, f"sshd of {address}")

    def inside(self, name: str, *command: str) -> None:
        """Run a command with the machine's network and mounts, which other machines do not see."""
        where = ["nsenter", "-t", str(self.daemons[name].pid), "-m", "-n", "--"]
        subprocess.run([*where, *command], check=True, capture_output=True, env={"PATH": PATH})

    def ssh_for_all(self) -> str:
        """A PATH whose `ssh` has these machines' key: for DeepSpeed, whose check takes no options.

        What an entry in the user's ~/.ssh/config does on a real cluster.
        """
        own = self.folder / "bin"
        own.mkdir(exist_ok=True)
        real = shutil.which("ssh", path=PATH)
        (own / "ssh").write_text(f'#!/bin/sh\nexec {real} {self.options} "$@"\n')
        (own / "ssh").chmod(0o755)
        return f"{own}{os.pathsep}{PATH}"

    def kill(self, name: str) -> None:
        """The machine is gone at once: its network, then all its processes."""
        _ip("-n", name, "link", "set", "eth7", "down")
        self._end_processes(name)

    def _end_processes(self, name: str) -> None:
        found = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, env={"PATH": PATH}
        )
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def down(self) -> None:
        for name in self.names:
            self._end_processes(name)
            _ip("netns", "del", name, check=False)
            _ip("link", "del", f"{name}v", check=False)
        _ip("link", "del", self.bridge, check=False)
        for daemon in self.daemons.values():
            daemon.wait(10)

    def hostfile(self, slots: int = 1) -> Path:
        file = self.folder / "hostfile"
        file.write_text("".join(f"{a} slots={slots}\n" for a in self.addresses))
        return file
