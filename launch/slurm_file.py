"""The text of the sbatch file: how a job finds its nodes, saves before its limit and goes on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mm.launch.launcher import Job
from mm.launch.preflight import inside
from mm.launch.restarts import HISTORY
from mm.launch.torchrun import command, watch_input

ATTEMPTS = "attempts.log"  # a line a start and an end of a job
STOP = "stop"  # `mm launch stop` makes it: what ends now is not requeued


def body(
    python: str,
    job: Job,
    *,
    workdir: Path,
    variables: str,
    setup: str,
    port: str,
    srun: str,
    nodes: int,
    processes: int,
    preflight: bool,
) -> str:
    """Shell up to the start of the ranks in the background: one task a node, torchrun in each."""
    logs = shlex.quote(str(job.home / "logs"))
    run = command(
        python,
        job,
        nodes=nodes,
        processes=str(processes),
        node_rank="$SLURM_NODEID",
        address="$MASTER_ADDR",
        port="$MASTER_PORT",
        logs=f"{logs}/node_$SLURM_NODEID",
    )
    check = inside.command(
        python,
        job,
        nodes=nodes,
        processes=processes,
        node_rank="$SLURM_NODEID",
        address="$MASTER_ADDR",
        port="$MASTER_PORT",
        exclude="cluster.options=[--exclude={}]",
    )
    return _BODY.format(
        workdir=shlex.quote(str(workdir)),
        variables=variables,
        setup=setup,
        port=port or "$((20000 + SLURM_JOB_ID % 20000))",
        srun=srun,
        python=shlex.quote(python),
        logs=logs,
        run=run,
        check=f"{check} || exit $?\n" if preflight else "",
    )


def batch(
    body: str, options: Sequence[str], job: Job, world: int, after_limit: str, restarts: int
) -> str:
    """A file for sbatch that stands alone."""
    again = {"requeue": _REQUEUE, "chain": _CHAIN, "array": _ARRAY}[after_limit]
    return _BATCH.format(
        options="\n".join(f"#SBATCH {shlex.quote(option)}" for option in options),
        home=shlex.quote(str(job.home)),
        history=HISTORY,
        world=world,
        attempts=ATTEMPTS,
        stop=STOP,
        body=body,
        again=again.format(restarts=restarts, attempts=ATTEMPTS),
    )


def interactive(body: str) -> str:
    """A script for the standard input of a shell that has an allocation."""
    ask = 'scancel --signal=USR1 "$SLURM_JOB_ID"'
    return f"{{\n{body}{watch_input(ask)}}}\n"


_BODY = """cd {workdir} || exit 3
{variables}{setup}
# One task a node; each starts its ranks by torchrun. The first node is the meeting point.
address() {{ scontrol show node "$1" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p'; }}
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
MASTER_ADDR=$(address "${{nodes[0]}}")
MASTER_PORT={port}
[ -n "$MASTER_ADDR" ] || {{ echo "mm: node ${{nodes[0]}} has no address" >&2; exit 3; }}
# The first node finds its network by the last one: its own name may lead it to a loopback.
MM_PEER=$MASTER_ADDR MM_PEER_OF_FIRST=$(address "${{nodes[-1]}}")
export MASTER_ADDR MASTER_PORT MM_PEER MM_PEER_OF_FIRST

read -r -d '' node <<'NODE'
trap '' USR1  # torchrun would die of it; the ranks save and end
[ "$SLURM_NODEID" = 0 ] && MM_PEER=$MM_PEER_OF_FIRST
found=$({python} -m mm.launch.interface $MM_PEER) && eval "$found" || exit 3
mkdir -p {logs}/node_$SLURM_NODEID
{check}exec {run}
NODE
{srun} bash -c "$node" < /dev/null &
"""

_BATCH = """#!/bin/bash
{options}

set -uo pipefail
home={home}
rm -f "$home/{stop}" "$home/refused"
tell() {{ # a line of the history, and of this job's output
  echo "$(date '+%F %T') job $SLURM_JOB_ID restart ${{SLURM_RESTART_COUNT:-0}}: $1" |
    tee -a "$home/{attempts}"
}}
saved() {{ ls "$home/../checkpoints" 2>/dev/null | sed -n 's/^step_0*//p' | sort -n | tail -n 1; }}
begun=$(date +%s) from=$(saved)
tell "starts on $SLURM_JOB_NODELIST"
{body}step=$!

# Slurm sends USR1 to this shell ahead of the limit (--signal=B:). The ranks are asked until they
# end: one that still starts does not hear the first time. TERM is the end: scancel.
asked=
ask() {{
  [ -z "$asked" ] || return
  asked=1
  while kill -0 $step 2>/dev/null; do scancel --quiet --signal=USR1 "$SLURM_JOB_ID"; sleep 5; done &
}}
trap ask USR1
wait $step; code=$?
while kill -0 $step 2>/dev/null; do wait $step; code=$?; done # a signal ends a wait

if [ $code = 0 ]; then how="all steps are done"
elif [ -e "$home/{stop}" ]; then how="stopped with a checkpoint by mm launch stop"
elif [ -n "$asked" ] || scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; then
  how="saved; goes on from the checkpoint"
elif [ -s "$home/refused" ]; then how="refused by the $(cat "$home/refused")"
else how="failed with exit code $code"
fi
tell "ended: $how"
# The same as a line of the run's history, which its report shows.
list=$(printf '"%s", ' "${{nodes[@]}}")
printf '{{"attempt": %d, "started": %d, "ended": %d, "nodes": [%s], "world": {world}, ' \\
  $(($(cat "$home/{history}" 2>/dev/null | wc -l) + 1)) "$begun" "$(date +%s)" "${{list%, }}" \\
  >> "$home/{history}"
printf '"step_from": %d, "step_to": %d, "code": %d, "why": "%s"}}\\n' \\
  "$from" "$(saved)" "$code" "job $SLURM_JOB_ID: $how" >> "$home/{history}"
{again}exit $code
"""

# Slurm itself requeues after the loss of a node.
_REQUEUE = """
# After an error of a rank the job is tried again, but not for ever.
errors=$(grep -c "job $SLURM_JOB_ID restart .*: ended: failed" "$home/{attempts}")
case $how in
  saved*) again=1 ;;
  failed*) [ "$errors" -le {restarts} ] && again=1 ;;
esac
if [ -n "${{again:-}}" ]; then
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this shell
fi
"""
_CHAIN = """
# The next attempt waits for an end with 0; it ends at once when all steps are done.
case $how in saved*) exit 0 ;; esac
"""
_ARRAY = """
# The next attempt begins by itself; there is none after the last step or an error.
case $how in saved*) exit 0 ;; esac
scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
"""
