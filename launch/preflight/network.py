"""Meeting point, interface and bandwidth between nodes."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.launch import interface
from mm.launch.preflight.check import (
    ALL,
    FIX,
    OK,
    WARN,
    Asked,
    Row,
    Seen,
    common,
    leave_out,
    n_bytes,
)
from mm.reading import parse_json

CONNECT_S = 3.0
MEET_S = 60.0
SPARE_PORTS = 3
SLOW = 12.5e6  # bytes a second: a tenth of gigabit Ethernet
_listening: list[socket.socket] = []  # of this process, between two steps


def read_interface(asked: Asked, told: Mapping[int, Any]) -> dict[str, Any]:
    """The interface that leads to the first node, and what the environment says instead."""
    named = {name: os.environ[name] for name in interface.NAMES if os.environ.get(name)}
    out: dict[str, Any] = {"named": named, "all": interface.addresses(), "leads": None, "why": ""}
    try:
        out["leads"] = interface.interface(socket.gethostbyname(asked.address))
    except OSError as error:
        out["why"] = f"no way to {asked.address}: {error.args[-1]}"
    lead = out["leads"]
    if lead:
        with contextlib.suppress(OSError, ValueError):
            out["mbit"] = int(Path(f"/sys/class/net/{lead}/speed").read_text())
        tc = shutil.which("tc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if tc:
            shown = [tc, "qdisc", "show", "dev", lead, "root"]
            done = subprocess.run(shown, capture_output=True, text=True)
            kind = done.stdout.split()[1:2]
            out["shaped"] = kind[0] if kind and kind[0] in ("tbf", "netem", "htb") else ""
    return out


def judge_interface(seen: Seen) -> Iterator[Row]:
    """What is named must be there and lead to the first node."""
    found = seen.of("interface")
    bad = False
    for i, value in found.items():
        host = seen.hosts[i]
        if value["why"]:
            bad = True
            yield Row("interface", host.name, FIX, value["why"], leave_out(host))
        for variable, name in value["named"].items():
            chosen = name.lstrip("=^").split(",")[0].split(":")[0]
            fits = [n for n in value["all"] if n.startswith(chosen)]
            if name.startswith("^") or (value["leads"] or "").startswith(chosen):
                continue
            bad = True
            said = f"{variable}={name}: " + (
                f"{value['all'][fits[0]]}, which does not lead to the first host"
                if fits
                else f"not here or without an address, only {', '.join(value['all'])}"
            )
            mend = f"cluster.env.{variable}={value['leads']}" if value["leads"] else "unset it"
            yield Row("interface", host.name, FIX, said, mend)
    if found and not bad:
        names = sorted({value["leads"] or "?" for value in found.values()})
        yield Row("interface", ALL, OK, ", ".join(names))


def listen(asked: Asked, told: Mapping[int, Any]) -> dict[str, Any]:
    """What the meeting point is called here; on the first node, hold its port open."""
    out: dict[str, Any] = {"resolves": [], "listens": "", "spare": [], "own": True}
    out["network"] = _network()
    try:
        infos = socket.getaddrinfo(asked.address, asked.port, socket.AF_INET, socket.SOCK_STREAM)
        out["resolves"] = sorted({str(info[4][0]) for info in infos})
    except OSError as error:
        out["listens"] = f"{asked.address} has no address here ({error.args[-1]})"
        return out
    if asked.rank:
        return out
    out["own"] = bool(set(out["resolves"]) & set(interface.addresses().values()))
    for port in (asked.port, *[0] * SPARE_PORTS):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
            sock.listen(1024)
        except OSError as error:
            owner = _owner(port)
            out["listens"] = f"port {port}: {error.strerror}{f' (by {owner})' if owner else ''}"
            sock.close()
            continue
        _listening.append(sock)
        if not port:
            out["spare"].append(sock.getsockname()[1])
    return out


def connect(asked: Asked, told: Mapping[int, Any]) -> dict[str, str]:
    """Connect to the port and to the spare ones: '' or why not, by port."""
    if not asked.rank or not told.get(0):
        return {}
    return {
        str(port): _try(asked.address, port) for port in (asked.port, *told[0].get("spare", ()))
    }


def close(asked: Asked, told: Mapping[int, Any]) -> None:
    """Give the ports back."""
    while _listening:
        _listening.pop().close()


def judge_rendezvous(seen: Seen) -> Iterator[Row]:
    """One routable address under one name, and a port that answers."""
    said, tried = seen.of("rendezvous"), seen.of("rendezvous", 1)
    if 0 not in said:  # that it does not answer is a row of its own
        return
    first, bad = said[0], False
    # Nodes of a scheduler that are one machine reach each other by its loopback.
    several = len({v["network"] for v in said.values()}) > 1
    routable = [a for v in said.values() for a in v["resolves"] if not _is_loopback(a)]
    for i, value in said.items():
        loop = [a for a in value["resolves"] if _is_loopback(a)] if several else []
        if loop or (not value["resolves"] and value["listens"]):
            bad = True
            why = f"resolves to {loop[0]}: its own loopback" if loop else value["listens"]
            mend = f"cluster.address={routable[0]}" if routable else "cluster.address=ADDRESS"
            yield Row("rendezvous", seen.hosts[i].name, FIX, why, mend)
    names = {i: tuple(v["resolves"]) for i, v in said.items() if v["resolves"]}
    if not bad and len(set(names.values())) > 1:
        bad, right = True, common(names)
        for i, addresses in names.items():
            if addresses != right:
                why = f"resolves to {', '.join(addresses)}, elsewhere {', '.join(right)}"
                mend = f"cluster.address={right[0]}"
                yield Row("rendezvous", seen.hosts[i].name, FIX, why, mend)
    if not bad and not first["own"]:
        bad = True
        why = f"{', '.join(first['resolves'])} is no address of this host, which must be the first"
        yield Row("rendezvous", seen.hosts[0].name, WARN, why, seen.hosts[0].on("ip -4 addr"))
    ports = [str(p) for p in first["spare"] if all(not t.get(str(p)) for t in tried.values())]
    other = f"cluster.port={ports[0]}" if ports else ""
    if first["listens"] and first["resolves"]:
        bad = True
        yield Row(
            "rendezvous", seen.hosts[0].name, FIX, first["listens"], other or "cluster.port=N"
        )
        return
    for i, results in tried.items():
        asked = next(iter(results.items()), None)
        if asked is None or not asked[1]:
            continue
        bad = True
        port, why = asked
        where = f"port {port} of {seen.hosts[0].name}: {why}"
        if ports:
            yield Row("rendezvous", seen.hosts[i].name, FIX, f"{where}; others answer", other)
        else:
            where += "; no other port answers either: a firewall, or no way there"
            yield Row("rendezvous", seen.hosts[i].name, FIX, where, leave_out(seen.hosts[i]))
    if not bad:
        answered = "" if len(said) == 1 else f", answers {len(tried) - (0 in tried)} other hosts"
        yield Row("rendezvous", ALL, OK, f"{', '.join(first['resolves'])}{answered}")


def _network() -> str:
    """What two nodes share that are one machine with one network."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    return socket.gethostname()


def meet(asked: Asked, told: Mapping[int, Any]) -> dict[str, Any]:
    """All-reduce, all-gather and pairs over the real backend, in processes that can be ended."""
    gpus = bool(shutil.which("nvidia-smi"))
    here = asked.processes if gpus else 1
    given = [str(x) for x in (asked.rank, asked.nodes, here, asked.address, asked.port)]
    environ = dict(os.environ)
    with contextlib.suppress(OSError):
        lead = interface.interface(socket.gethostbyname(asked.address))
        for name in interface.NAMES:
            environ.setdefault(name, lead or "lo")
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "mm.launch.preflight.collective", *given, str(local)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for local in range(here)
    ]
    out, why = "", ""
    for child in children:
        try:
            said, complaint = child.communicate(timeout=MEET_S)
            out += said
            if child.returncode:
                lines = complaint.strip().splitlines() or [f"exit code {child.returncode}"]
                why = why or lines[-1][:200]
        except subprocess.TimeoutExpired:
            why = why or f"no end after {MEET_S:.0f} s"
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    found = [parse_json(line) for line in out.splitlines() if line.startswith("{")]
    return {"why": why, **(found[0] if found and not why else {})}


def judge_collectives(seen: Seen) -> Iterator[Row]:
    """Right sums everywhere, and no pair far behind the others or its own interface."""
    found = seen.of("collectives")
    broken = {i: v["why"] for i, v in found.items() if v["why"]}
    for i, why in broken.items():
        yield Row("collectives", seen.hosts[i].name, FIX, why, leave_out(seen.hosts[i]))
    wrong = [i for i, v in found.items() if not v["why"] and not v["right"]]
    for i in wrong:
        said = "an all-reduce or all-gather gave wrong numbers"
        yield Row("collectives", seen.hosts[i].name, FIX, said, leave_out(seen.hosts[i]))
    if broken or wrong or not found:
        return
    pairs = {tuple(p["hosts"]): p["rate"] for v in found.values() for p in v["pairs"]}
    yield from slow_pairs(seen, pairs)
    value = found[min(found)]
    said = f"{value['backend']}: all-reduce {n_bytes(value['all_reduce'])}/s, all-gather "
    said += f"{n_bytes(value['all_gather'])}/s, right"
    if pairs:
        said += f"; pairs {n_bytes(min(pairs.values()))}/s to {n_bytes(max(pairs.values()))}/s"
    yield Row("collectives", ALL, OK, said)


def slow_pairs(seen: Seen, pairs: Mapping[tuple[int, ...], float]) -> Iterator[Row]:
    """A row for every host that the slow pairs have in common, or else for both of a pair.

    A pair is slow below half of the upper quartile where there are at least 3 pairs, below a
    twentieth of the interface's speed, and below `SLOW` anyway.
    """
    if not pairs:
        return
    # of three hosts a bad one has two of the three pairs: the middle would be its own
    typical = sorted(pairs.values())[len(pairs) * 3 // 4] if len(pairs) > 2 else 0.0
    links = seen.of("interface")
    mbit = [v["mbit"] for v in links.values() if v.get("mbit", -1) > 0]
    least = max(SLOW, typical / 2, min(mbit) * 1e6 / 8 / 20 if mbit else 0.0)
    left = {pair: rate for pair, rate in pairs.items() if rate < least}
    while left:
        count = {i: sum(i in pair for pair in left) for pair in left for i in pair}
        shaped = {i: links.get(i, {}).get("shaped") or "" for i in count}
        guilty = max(count, key=lambda i: (count[i], bool(shaped[i]), i))
        mine = {pair: rate for pair, rate in left.items() if guilty in pair}
        others = [seen.hosts[j].name for pair in mine for j in pair if j != guilty]
        said = f"{n_bytes(min(mine.values()))}/s with {', '.join(others[:3])}, at least "
        said += f"{n_bytes(least)}/s is expected"
        host, mend = seen.hosts[guilty], leave_out(seen.hosts[guilty])
        if shaped[guilty]:
            lead = links[guilty]["leads"]
            said += f"; {lead} is slowed by a queue ({shaped[guilty]})"
            mend = host.on(f"PATH=$PATH:/usr/sbin tc qdisc del dev {lead} root")
        yield Row("link", host.name, FIX, said, mend)
        left = {pair: rate for pair, rate in left.items() if pair not in mine}


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _try(address: str, port: int) -> str:
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S):
            return ""
    except TimeoutError:
        return f"no answer in {CONNECT_S:.0f} s"
    except OSError as error:
        return error.strerror or str(error)


def _owner(port: int) -> str:
    """The process that listens on a port of this machine, where it may be seen."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{words[9]}]")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) in inodes:
                command = Path(*link.parts[:3], "cmdline").read_bytes().replace(b"\0", b" ")
                return f"process {link.parts[2]}, {command.decode(errors='replace')[:60].strip()}"
    return ""
