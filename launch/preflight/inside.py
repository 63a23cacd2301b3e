"""The preflight inside a scheduler's job: an agent on every node, driven by the first one.

The agents come to the first node, as its ranks will: to the port after that of the rendezvous. No
secret is asked for there, as none is by torchrun's own meeting point; an agent does the checks of
its own command line, whoever asks.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from mm.launch.launcher import Job
from mm.launch.preflight import drive
from mm.launch.preflight.agent import MARK, answer
from mm.launch.preflight.check import Asked, Endpoint
from mm.reading import parse_json

HELLO_S = 10.0
LONGEST = 1 << 24  # bytes of a line


class _Line(drive.Agent):
    """An agent that came over the network, or one that did not."""

    def __init__(self, endpoint: Endpoint, connection: socket.socket | None, wait_s: float):
        super().__init__(endpoint)
        self._connection = connection
        if connection is None:
            self.complaints.append(f"did not come to the first node within {wait_s:.0f} s")
        else:
            self.listen(iter(_lines(connection).readline, ""))

    def write(self, text: str) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.sendall(text.encode())

    def end(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _lines(connection: socket.socket) -> Any:
    return connection.makefile("r", encoding="utf-8", errors="replace", newline="\n")


class Driver(threading.Thread):
    """On the first node: waits for the agents of all nodes, asks them and judges.

    Attributes:
        report: what was found, once the thread has ended; None where it failed itself.
        complete: whether every node came.
    """

    def __init__(self, asked: Asked, exclude: str, wait_s: float):
        super().__init__(daemon=True)
        self.report: drive.Report | None = None
        self.complete = False
        self._asked, self._exclude, self._wait_s = asked, exclude, wait_s
        self._server = socket.create_server(("", meeting_port(asked)), backlog=asked.nodes)

    def run(self) -> None:
        begun = time.monotonic()
        with ExitStack() as stack:
            stack.callback(self._server.close)
            came = self._wait(begun + self._wait_s)
            self.complete = len(came) == self._asked.nodes
            agents: dict[int, drive.Agent] = {}
            for i in range(self._asked.nodes):
                name, connection = came.get(i, (f"node {i}", None))
                endpoint = Endpoint(
                    name, ("ssh", name, "bash"), self._asked.processes, self._exclude
                )
                agents[i] = _Line(endpoint, connection, self._wait_s)
                stack.callback(agents[i].end)
            rows = drive.examine(agents, {i: {} for i in agents})
            report = drive.Report(rows, len(agents), time.monotonic() - begun)
            verdict = json.dumps({"code": exit_code(report, self.complete)}) + "\n"
            for agent in agents.values():
                agent.write(verdict)
            self.report = report

    def _wait(self, deadline: float) -> dict[int, tuple[str, socket.socket]]:
        """Name and connection of every node that says hello in time."""
        came: dict[int, tuple[str, socket.socket]] = {}
        while len(came) < self._asked.nodes and (left := deadline - time.monotonic()) > 0:
            self._server.settimeout(left)
            try:
                connection = self._server.accept()[0]
                connection.settimeout(HELLO_S)
                hello = parse_json(_hello(connection))
                node, name = int(hello["node"]), str(hello["name"])[:80]
                fits = hello["nonce"] == self._asked.nonce and 0 <= node < self._asked.nodes
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours, or the end of the wait
            connection.settimeout(None)
            if fits:
                came[node] = name, connection  # one that came again has lost its first connection
            else:
                connection.close()
        return came


def _hello(connection: socket.socket) -> str:
    """The first line, read byte by byte: what follows is for another reader."""
    out = b""
    while not out.endswith(b"\n") and len(out) < 1000:
        byte = connection.recv(1)
        if not byte:
            break
        out += byte
    return out.decode(errors="replace")


def meeting_port(asked: Asked) -> int:
    """Where agents come to: the port after that of the rendezvous, which is itself checked."""
    return asked.port + 1 if asked.port < 65535 else asked.port - 1


def exit_code(report: drive.Report, complete: bool) -> int:
    """0: go on; 2: something is to be mended; 1: a node did not come, which may pass."""
    return 0 if not report.to_mend else 2 if complete else 1


def follow(asked: Asked, name: str, wait_s: float) -> int | None:
    """Be the agent of a node to the verdict of the first one: an exit code; None: it is gone."""
    connection = _connect(asked, time.monotonic() + wait_s)
    if connection is None:
        return None
    with connection:
        hello = {"node": asked.rank, "name": name, "nonce": asked.nonce}
        connection.sendall((json.dumps(hello) + "\n").encode())
        connection.settimeout(wait_s + drive.ROUND_S * 2)
        lines = _lines(connection)
        with suppress(OSError, ValueError):
            while line := lines.readline(LONGEST):
                words = parse_json(line)
                if "code" in words:
                    return int(words["code"])
                said: Any = {"time": time.time()}
                if words["round"] >= 0:
                    said = answer({**words, "asked": asked.__dict__})
                connection.sendall(f"{MARK}{json.dumps(said)}\n".encode())
    return None


def _connect(asked: Asked, deadline: float) -> socket.socket | None:
    address = asked.address if asked.rank else "127.0.0.1"
    while True:
        try:
            return socket.create_connection((address, meeting_port(asked)), timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.5)


def run(
    asked: Asked, name: str, exclude: str, wait_s: float
) -> tuple[int | None, drive.Report | None]:
    """The preflight of one node of a job.

    Args:
        exclude: template of the override that starts without a node, ``{}`` for its name.
        wait_s: seconds for all nodes to come.

    Returns:
        Exit code, None where the first node did not answer; on the first node the report.
    """
    driver = None
    if asked.rank == 0:
        try:
            driver = Driver(asked, exclude, wait_s)
        except OSError:  # the port is taken: the others would wait in vain
            return None, None
        driver.start()
    code = follow(asked, name, wait_s)
    if driver is None:
        return code, None
    driver.join(timeout=wait_s)
    return code, driver.report


def note(home: Path, report: drive.Report, code: int) -> None:
    """Write the report to ``home``, and the file that a job's script reads where it is refused."""
    refused = home / "refused"
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_dict(), indent=1)
        (home / "preflight.json").write_text(text + "\n")
        refused.unlink(missing_ok=True)
        if code == 2:
            refused.write_text(f"preflight: {len(report.to_mend)} to mend, see preflight.json\n")


def host_name() -> str:
    """What the scheduler calls this node, or the system."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def command(
    python: str,
    job: Job,
    *,
    nodes: int,
    processes: int,
    node_rank: str,
    address: str,
    port: str,
    exclude: str = "",
    wait_s: int = 60,
) -> str:
    """The line of shell that checks a node; rank, address and port may name shell variables."""
    told = {
        "nodes": nodes,
        "processes": processes,
        "config": job.config,
        "overrides": list(job.overrides),
        "folder": str(job.folder.parent),
        "home": str(job.home),
        "exclude": exclude,
        "wait_s": wait_s,
    }
    words = [shlex.quote(python), "-m mm.cli.preflight", node_rank, address, port]
    return " ".join([*words, "\\\n    " + shlex.quote(json.dumps(told))])
