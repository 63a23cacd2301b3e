"""Kubernetes: an indexed Job with a headless service, or Kubeflow's PyTorchJob or TrainJob."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from mm import config as configs
from mm.errors import UserError
from mm.launch.forward import is_secret, public
from mm.launch.launcher import PORT, Job, Launcher, Plan, quote
from mm.launch.manifest import Pod, dump, manifest, pod_script
from mm.registry import LAUNCHERS

FILE = "k8s.yaml"
# What kubectl calls it, and the label that its pods have.
RESOURCES = {
    "job": ("job", "job-name"),
    "pytorchjob": ("pytorchjob.kubeflow.org", "training.kubeflow.org/job-name"),
    "trainjob": ("trainjob.trainer.kubeflow.org", "jobset.sigs.k8s.io/jobset-name"),
}


@LAUNCHERS.register("k8s")
class K8s(Launcher):
    """A cluster of Kubernetes; kubectl works here, run folders are on a volume of all pods."""

    small: ClassVar = {"image": "mm:latest"}

    kind: Literal["k8s"] = "k8s"
    resource: Annotated[
        Literal["job", "pytorchjob", "trainjob"],
        Field(description="job: needs nothing more; the others: Kubeflow's operators"),
    ] = "job"
    image: Annotated[str, Field(description="image with this package in it")]
    namespace: Annotated[str | None, Field(description="default: that of kubectl")] = None
    claim: Annotated[
        str, Field(description="PersistentVolumeClaim (ReadWriteMany) of the run folders")
    ] = "runs"
    mount: Annotated[
        Path | None, Field(description="where pods have it; default: the path of `out` here")
    ] = None
    claims: Annotated[
        dict[str, str], Field(description="more claims, such as of the data: NAME: FOLDER")
    ] = {}
    shared_memory_gib: Annotated[int, Field(gt=0, description="of /dev/shm: data workers")] = 16
    request_gpus: Annotated[bool, Field(description="off on CPUs")] = True
    gpu_resource: Annotated[str, Field(description="what a GPU is called")] = "nvidia.com/gpu"
    resources: Annotated[
        dict[str, str], Field(description="more of a pod: {cpu: '32', memory: 256Gi}")
    ] = {}
    secrets: Annotated[
        dict[str, str], Field(description="variables from secrets: NAME: SECRET/KEY")
    ] = {"WANDB_API_KEY": "wandb/api-key"}
    save_s: Annotated[
        int, Field(gt=0, description="seconds that a pod has for a checkpoint before it is ended")
    ] = 180
    restarts: Annotated[int, Field(ge=0, description="failures of a node that are made good")] = 10
    runtime: Annotated[str, Field(description="trainjob: name of its runtime")] = (
        "torch-distributed"
    )
    pod: Annotated[
        dict[str, Any], Field(description="more of a pod: nodeSelector, tolerations ...")
    ] = {}

    @model_validator(mode="after")
    def _secrets_are_references(self) -> K8s:
        for name, place in self.secrets.items():
            if not re.fullmatch(r"[a-z0-9.-]+/[\w.-]+", place):
                raise ValueError(f"secrets.{name}: say SECRET/KEY, never the value itself")
        return self

    @property
    def interpreter(self) -> str:
        return self.python or "python"  # that of the image

    def plan(self, job: Job) -> Plan:
        nodes, processes = self.nodes or 1, self.gpus_per_node or 1
        name, mount = _name(job.folder.name), self.mount or job.folder.parent
        values = configs.override(configs.read(job.config), job.overrides)
        environ = dict(job.environ)
        environ.pop("PYTHONPATH", None)  # of this machine
        inside = job._replace(
            config="/etc/mm/run.yaml", overrides=(f"out={mount}",), folder=mount / job.folder.name
        )
        port = self.port or PORT
        limits = dict(self.resources)
        if self.request_gpus:
            limits[self.gpu_resource] = str(processes)
        pod = Pod(
            name=name,
            namespace=self.namespace,
            nodes=nodes,
            processes=processes,
            image=self.image,
            workdir=str(self.workdir) if self.workdir else None,
            script=pod_script(
                self.interpreter, inside, self.resource, nodes, processes, self.preflight
            ),
            port=port,
            environ=public(environ) | self.env,
            secrets=self.secrets,
            limits=limits,
            claims={self.claim: str(mount)} | self.claims,
            shared_memory_gib=self.shared_memory_gib,
            save_s=self.save_s,
            restarts=self.restarts,
            runtime=self.runtime,
            more=self.pod,
            config=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        )
        text = dump(manifest(self.resource, pod))
        apply = ("kubectl", *self._where(), "apply", "-o", "name", "-f", str(job.home / FILE))
        return Plan(nodes * processes, {FILE: text}, commands=(apply,), notes=self._notes(job))

    def _notes(self, job: Job) -> tuple[str, ...]:
        """How secrets get there; which would not."""
        notes = []
        for name, place in self.secrets.items():
            secret, _, key = place.partition("/")
            words = ["kubectl", *self._where(), "create", "secret", "generic", secret]
            notes.append(f"{name} is read from a secret; once: {quote(words)} "
                         f'--from-literal={key}="${name}"')  # fmt: skip
        for name in job.environ:
            if is_secret(name) and name not in self.secrets:
                notes.append(f"{name} is not in the file; say cluster.secrets.{name}=SECRET/KEY")
        return tuple(notes)

    def _where(self) -> list[str]:
        return [f"--namespace={self.namespace}"] if self.namespace else []

    def _target(self, record: Mapping[str, Any]) -> tuple[list[str], str, str, str]:
        """kubectl and its namespace, resource, name and label of the pods."""
        resource, label = RESOURCES[self.resource]
        name = _name(Path(str(record.get("home", ""))).parent.name)
        return ["kubectl", *self._where()], resource, name, f"{label}={name}"

    def has(self, record: Mapping[str, Any]) -> bool:
        return not self.status(record).startswith("kubectl")

    def status(self, record: Mapping[str, Any]) -> str:
        kubectl, resource, name, _ = self._target(record)
        words = [*kubectl, "get", resource, name, "--no-headers"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"kubectl does not answer: {error}"
        said = " ".join((done.stdout or done.stderr).split())
        return f"kubectl: {said}" if done.returncode else said

    def stop_commands(self, record: Mapping[str, Any], now: bool) -> Sequence[Sequence[str]]:
        kubectl, resource, name, label = self._target(record)
        # pods get TERM, save, and have `save_s` seconds for it
        commands = [[*kubectl, "delete", resource, name, "--wait=false"]]
        if now:
            force = ["--grace-period=0", "--force", "--wait=false"]
            commands.append([*kubectl, "delete", "pods", f"--selector={label}", *force])
        return commands

    def log_command(self, record: Mapping[str, Any]) -> Sequence[str]:
        kubectl, _, _, label = self._target(record)
        return [*kubectl, "logs", f"--selector={label}", "--prefix", "--tail=100"]


def _name(run: str) -> str:
    """A name that Kubernetes takes. Raises UserError when nothing of the run's is left."""
    name = re.sub(r"[^a-z0-9-]+", "-", run.lower()).strip("-")[:50].strip("-")
    if not name:
        raise UserError(f"name: '{run}' has no letter or digit that Kubernetes takes")
    return name if name[0].isalpha() else f"run-{name}"
