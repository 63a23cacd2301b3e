"""The command of one node: torchrun with a static rendezvous, a log file a rank, rank prefixes."""

from __future__ import annotations

import shlex
from pathlib import Path

from mm.launch.forward import public
from mm.launch.launcher import Job, exports, quote

GRACE_S = 40  # torchrun gives its workers 30 s


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
        quote(job.train),
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
) -> str:
    """Shell that trains as one node until it ends, or until its standard input does.

    A line ``stop`` on standard input asks the ranks for a checkpoint and an end (exit code 75); the
    end of the input, as when the machine that launched is gone, ends the node.
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
        f"{watch_input()}"
        "}\n"
    )


def watch_input(ask: str = "kill -USR1 $(cat /proc/$run/task/*/children)") -> str:
    """Shell that waits for the last background process, and for words on standard input.

    ``ask`` is the command that asks the ranks for a checkpoint and an end.
    """
    return (
        "run=$!\n"
        "exec 3<&0\n"
        "{ while read -r word <&3; do\n"
        f'    [ "$word" = stop ] && {ask}\n'
        "  done\n"
        "  kill -TERM $run 2>/dev/null\n"
        f"  for _ in $(seq {GRACE_S}); do kill -0 $run 2>/dev/null || exit; sleep 1; done\n"
        "  kill -KILL $(cat /proc/$run/task/*/children) $run\n"
        "} 2>/dev/null > /dev/null &\n"
        "watch=$!\n"
        "wait $run; code=$?\n"
        "kill $watch 2>/dev/null\n"
        "exit $code\n"
    )
