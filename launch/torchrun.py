"""The command of one node: torchrun with a static rendezvous, a log file a rank, rank prefixes."""

from __future__ import annotations

import shlex
from pathlib import Path

from mm.launch.forward import public
from mm.launch.launcher import Job, exports, quote

GRACE_S = 40  # torchrun gives its workers 30 s
QUIT_S = 8  # to ranks whose job has failed already
LEASE_S = 30  # a node that hears nothing for so long ends its ranks
STATE = "mm-state"  # begins a line of a node about one of its ranks: process, state
RANKS = "$(cat /proc/$run/task/*/children)"


def command(
    python: str,
    job: Job,
    *,
    nodes: int,
    processes: str,
    node_rank: str,
    address: str,
    port: str,
    logs: str,
) -> str:
    """One line of shell. Texts may name shell variables: they are not quoted again."""
    words = [
        shlex.quote(python),
        "-m torch.distributed.run",
        f"--nnodes={nodes}",
        f"--node_rank={node_rank}",
        f"--nproc_per_node={processes}",
        f"--master_addr={address}",
        f"--master_port={port}",
        f"--log_dir={logs}",
        "--tee=3",
        "--log_line_prefix_template='[rank ${rank}] '",
        "-m",
        quote(job.words),
    ]
    return " \\\n    ".join(words)


def node_script(
    python: str,
    job: Job,
    workdir: Path,
    env: dict[str, str],
    *,
    nodes: int,
    node_rank: int,
    processes: int,
    address: str,
    port: int,
    lease_s: int = 0,
) -> str:
    """Shell that trains as one node until it ends, or until its standard input does.

    Words on standard input: ``stop`` asks the ranks for a checkpoint and an end (exit code 75),
    ``quit`` ends them, ``stacks`` has them write where they are, ``alive`` is answered. The end of
    the input, as when the machine that launched is gone, ends the node.
    """
    logs = shlex.quote(str(job.home / "logs" / f"node_{node_rank}"))
    run = command(
        python,
        job,
        nodes=nodes,
        processes=str(processes),
        node_rank=str(node_rank),
        address=address,
        port=str(port),
        logs=logs,
    )
    interface = (
        f"found=$({shlex.quote(python)} -m mm.launch.interface {address}) "
        '&& eval "$found" || exit 3\n'
    )
    return (
        "{\n"  # a group is read whole before it runs: what follows on the input is for `read`
        f"cd {shlex.quote(str(workdir))} || exit 3\n"
        f"{exports(public(dict(job.environ)) | env)}"
        f"{interface if nodes > 1 else ''}"
        f"mkdir -p {logs}\n"
        "trap '' USR1  # torchrun must not take it: the ranks do\n"
        f"{run} < /dev/null &\n"
        f"{watch_input(lease_s=lease_s)}"
        "}\n"
    )


def watch_input(ask: str = f"kill -USR1 {RANKS}", lease_s: int = 0) -> str:
    """Shell that waits for the last background process, and for words on standard input.

    ``ask`` is the command that asks the ranks for a checkpoint and an end. With ``lease_s`` the
    ranks are killed when no word has come for so long: whoever lost this node may then start
    others in its place.
    """
    wait = f"-t {lease_s} " if lease_s else ""
    return (
        "run=$!\n"
        "exec 3<&0 4>&1\n"
        "end() { kill -TERM $run; for _ in $(seq $1); do kill -0 $run || exit; sleep 1; done\n"
        f"    kill -KILL {RANKS} $run; exit; }}\n"
        f"{{ while :; do read {wait}-r word <&3; got=$?; [ $got -gt 0 ] && break\n"
        "  case $word in\n"
        f"    stop) {ask};;\n"
        f"    stacks) kill -USR2 {RANKS};;\n"
        f"    quit) end {QUIT_S};;\n"
        f"    alive) echo {STATE} >&4; for p in {RANKS}; do\n"
        f'      read -r _ _ state _ < /proc/$p/stat && echo "{STATE} $p $state" >&4; done;;\n'
        "  esac; done\n"
        f"  [ $got -gt 128 ] && kill -KILL {RANKS} $run\n"
        f"  end {GRACE_S}\n"
        "} 2>/dev/null > /dev/null &\n"
        "watch=$!\n"
        "wait $run; code=$?\n"
        "kill $watch 2>/dev/null\n"
        "exit $code\n"
    )
