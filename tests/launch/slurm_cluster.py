"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd in one folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from machines import PATH, mm, wait_for

from mm.launch.environment import free_port

CONF = """ClusterName=mmtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=1
MpiDefault=none
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """Nodes n1 and n2, both this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        # the tools find the cluster by it
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def up(self) -> None:
        """Start the daemons; fails with their logs when the nodes do not come up."""
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        place = self.folder / "munge"
        for name in ("munge", "state", "spool_n1", "spool_n2"):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname().split(".")[0],
                folder=self.folder,
                control=free_port(),
                first=free_port(),
                second=free_port(),
            )
        )
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.folder}/munge.socket", f"--pid-file={place}/munged.pid",
            f"--seed-file={place}/seed", f"--log-file={place}/log",
        )  # fmt: skip
        wait_for(lambda: (self.folder / "munge.socket").exists(), 20, "munged")
        self._start("slurmctld", "-D", "-i")
        for name in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", name)
        idle = lambda: self.ask("sinfo", "--noheader", "--format=%T").split() == ["idle"]
        try:
            wait_for(idle, 30, "two idle nodes")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def _start(self, *words: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *words],  # none outlives the tests
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environ,
                start_new_session=True,
            )
        self.daemons.append(child)

    def ask(self, *words: str) -> str:
        """What a tool of Slurm prints; '' when it fails."""
        done = subprocess.run(
            words, capture_output=True, text=True, env=os.environ | self.environ, timeout=60
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def mm(self, *words: str, cwd: Path, **env: str) -> tuple[int, str]:
        """`mm WORDS` as on a machine of the cluster: exit code and all that it wrote."""
        return mm(*words, cwd=cwd, **env, **self.environ)  # pyright: ignore[reportArgumentType]

    def state(self, job: str) -> str:
        """JobState of a job, also of one that ended a moment ago."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        found = [word.partition("=")[2] for word in words if word.startswith("JobState=")]
        return found[-1] if found else ""

    def logs(self) -> str:
        """The last lines of all daemons."""
        files = [*self.folder.glob("*.log"), self.folder / "munge" / "log"]
        return "\n".join(
            f"--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:])
            for file in files
            if file.exists()
        )

    def down(self) -> None:
        """End all jobs and daemons."""
        self.ask("scancel", "--user=root", "--full", "--signal=KILL")
        self.ask("scancel", "--user=root")
        with suppress(AssertionError):
            wait_for(lambda: not self.ask("squeue", "--noheader"), 15, "the jobs to end")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
