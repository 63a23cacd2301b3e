"""Seconds to the first step on two machines: `mm launch ssh` beside torchrun by hand.

    python benchmarks/launch_time.py --tries 3 --json launch_time.json

The machines are network namespaces with an sshd each; needs root and the packages of the launch
tests (tests/launch/machines.py). By hand: two ssh commands at once, without any check.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "launch"), str(ROOT / "tests")]

import deaths  # noqa: E402  # pyright: ignore[reportMissingImports]
import start_toys  # noqa: E402  # pyright: ignore[reportMissingImports]
from machines import Hosts, background, environment, steps_done, wait_for  # noqa: E402  # pyright: ignore[reportMissingImports]

BAR = 25.0  # seconds more than by hand
PORT = 29533


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    took: dict[str, list[float]] = {"by hand": [], "mm launch ssh": [], "no preflight": []}
    with tempfile.TemporaryDirectory() as folder:
        root, hosts = Path(folder) / "runs", Hosts(Path(folder))
        root.mkdir()
        start_toys.packed(root)
        hosts.up()
        try:
            for n in range(asked.tries):
                for way in took:
                    took[way].append(seconds_to_first_step(hosts, root, way, n))
                    print(f"{n + 1}/{asked.tries} {way}: {took[way][-1]:.1f} s", flush=True)
        finally:
            hosts.down()
    if asked.json:
        asked.json.write_text(json.dumps(took, indent=1))
    middle = {way: statistics.median(values) for way, values in took.items()}
    print("| way | median, s | more than by hand, s |\n|---|---:|---:|")
    for way, value in middle.items():
        print(f"| {way} | {value:.1f} | {value - middle['by hand']:.1f} |")
    return int(middle["mm launch ssh"] - middle["by hand"] > BAR)


def seconds_to_first_step(hosts: Hosts, root: Path, way: str, n: int) -> float:
    """From the command to the first line of metrics.jsonl, of a run that is ended then."""
    name = f"{way.replace(' ', '_')}_{n}"
    config, folder = deaths.config(root, name), root / "out" / name
    begun = time.monotonic()
    first = lambda: steps_done(folder) > 0
    if way == "by hand":
        running = [
            subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for c in by_hand(hosts, config)
        ]
        try:
            wait_for(first, 300, f"the first step {way}")
            return time.monotonic() - begun
        finally:
            for machine in hosts.names:
                hosts._end_processes(machine)
                hosts.serve(machine)
            for child in running:
                child.wait(30)
    words = ["launch", "ssh", str(config), f"cluster.hostfile={hosts.hostfile()}"]
    words.append(f"cluster.options={hosts.options}")
    if way == "no preflight":
        words.append("--no-preflight")
    with background(*words, cwd=root) as child:
        wait_for(lambda: first() or child.poll() is not None, 300, f"the first step of {way}")
        seconds = time.monotonic() - begun
        assert child.poll() is None or first(), child.communicate()[0]
        child.terminate()
        child.communicate(timeout=120)
    return seconds


def by_hand(hosts: Hosts, config: Path) -> list[list[str]]:
    """What one would type on two terminals."""
    own = environment()
    out = []
    for rank, address in enumerate(hosts.addresses):
        given = {"PYTHONPATH": own["PYTHONPATH"], "GLOO_SOCKET_IFNAME": "eth7"}
        given |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank"]
        words += [str(rank), "--nproc-per-node", "1", "--master-addr", hosts.addresses[0]]
        words += ["--master-port", str(PORT), "-m", "mm", "train", str(config)]
        line = " ".join(["env", *(f"{k}={v}" for k, v in given.items()), shlex.join(words)])
        where = f"cd {shlex.quote(str(config.parent))} && exec {line}"
        out.append(["ssh", *hosts.options.split(), address, where])
    return out


if __name__ == "__main__":
    sys.exit(main())
