"""Manifests of a training job for Kubernetes: one pod template, three kinds of job around it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from mm.launch.launcher import Job
from mm.launch.preflight import inside
from mm.launch.torchrun import command

CONTAINER = {"job": "trainer", "pytorchjob": "pytorch", "trainjob": "node"}  # as operators name it
STOPPED = 75  # of `mm train`: a checkpoint is saved
REFUSED = 2  # of the preflight: what another pod would find as well
COMES_S = 900  # images are pulled


class Pod(NamedTuple):
    """What all pods of a job have."""

    name: str
    namespace: str | None
    nodes: int
    processes: int
    image: str
    workdir: str | None
    script: str
    port: int
    environ: Mapping[str, str]
    secrets: Mapping[str, str]  # variable -> SECRET/KEY
    limits: Mapping[str, str]
    claims: Mapping[str, str]  # PersistentVolumeClaim -> folder
    shared_memory_gib: int
    save_s: int
    restarts: int
    runtime: str
    more: Mapping[str, Any]
    config: str  # text of the run's YAML

    @property
    def metadata(self) -> dict[str, Any]:
        return {"name": self.name} | ({"namespace": self.namespace} if self.namespace else {})


def pod_script(
    python: str, job: Job, resource: str, nodes: int, processes: int, preflight: bool
) -> str:
    """Shell of a pod, its first process: at TERM the ranks save and end."""
    rank = "$JOB_COMPLETION_INDEX" if resource == "job" else "$PET_NODE_RANK"
    prefix = "" if resource == "job" else "PET_"
    logs = f"{shlex.quote(str(job.home / 'logs'))}/node_{rank}"
    run = command(
        python,
        job,
        nodes=nodes,
        processes=str(processes),
        node_rank=rank,
        address=f"${prefix}MASTER_ADDR",
        port=f"${prefix}MASTER_PORT",
        logs=logs,
    )
    check = inside.command(
        python,
        job,
        nodes=nodes,
        processes=processes,
        node_rank=rank,
        address=f"${prefix}MASTER_ADDR",
        port=f"${prefix}MASTER_PORT",
        wait_s=COMES_S,
    )
    return (
        f"mkdir -p {logs}\n"
        + (f"{check} || exit $?\n" if preflight and nodes > 1 else "")
        + "trap '' USR1  # torchrun would die of it; the ranks save and end\n"
        f"{run} &\n"
        "run=$! asked=\n"
        "trap 'asked=1; kill -USR1 $(cat /proc/$run/task/*/children)' TERM\n"
        "wait $run; code=$?\n"
        "while kill -0 $run 2>/dev/null; do wait $run; code=$?; done # a signal ends a wait\n"
        f'[ $code != 0 ] && [ -n "$asked" ] && exit {STOPPED}\n'
        "exit $code\n"
    )


class _Dumper(yaml.SafeDumper):
    """Without references, and with texts of many lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(objects: list[dict[str, Any]]) -> str:
    """The objects as YAML."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def manifest(resource: str, pod: Pod) -> list[dict[str, Any]]:
    """The objects that kubectl applies."""
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": pod.metadata,
        "data": {"run.yaml": pod.config},
    }
    make = {"job": _job, "pytorchjob": _pytorchjob, "trainjob": _trainjob}[resource]
    return [config, *make(pod)]


def _env(pod: Pod, **more: str) -> list[dict[str, Any]]:
    given = dict(pod.environ) | more
    plain: list[dict[str, Any]] = [{"name": n, "value": v} for n, v in given.items()]
    for name, place in pod.secrets.items():
        secret, _, key = place.partition("/")
        reference = {"name": secret, "key": key, "optional": True}
        plain.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return plain


def _volumes(pod: Pod) -> list[dict[str, Any]]:
    memory = {"medium": "Memory", "sizeLimit": f"{pod.shared_memory_gib}Gi"}
    return [
        {"name": "config", "configMap": {"name": pod.name}},
        {"name": "shared-memory", "emptyDir": memory},
        *(
            {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}}
            for i, claim in enumerate(pod.claims)
        ),
    ]


def _mounts(pod: Pod) -> list[dict[str, Any]]:
    return [
        {"name": "config", "mountPath": "/etc/mm"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *({"name": f"claim-{i}", "mountPath": at} for i, at in enumerate(pod.claims.values())),
    ]


def _template(pod: Pod, resource: str, restart: str, **env: str) -> dict[str, Any]:
    """The pod template of a Job and of a PyTorchJob."""
    container: dict[str, Any] = {
        "name": CONTAINER[resource],
        "image": pod.image,
        "command": ["bash", "-c", pod.script],
        "env": _env(pod, **env),
        "resources": {"limits": dict(pod.limits)},
        "volumeMounts": _mounts(pod),
    }
    if pod.workdir:
        container["workingDir"] = pod.workdir
    spec = {
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": pod.save_s,
        "containers": [container],
        "volumes": _volumes(pod),
        **pod.more,
    }
    return {"spec": spec}


def _job(pod: Pod) -> list[dict[str, Any]]:
    """A headless service, by which pods have names, and a Job that gives each its place."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": pod.metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the ranks meet before any pod is ready
            "selector": {"job-name": pod.name},
        },
    }
    first = f"{pod.name}-0.{pod.name}"
    template = _template(pod, "job", "Never", MASTER_ADDR=first, MASTER_PORT=str(pod.port))
    template["spec"]["subdomain"] = pod.name
    refused = {"containerName": CONTAINER["job"], "operator": "In", "values": [REFUSED]}
    codes = {"containerName": CONTAINER["job"], "operator": "In", "values": [STOPPED]}
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": pod.metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": pod.nodes,
            "parallelism": pod.nodes,
            "backoffLimit": pod.restarts * pod.nodes,  # one that fails takes the others with it
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": refused},
                    {"action": "Ignore", "onExitCodes": codes},
                    {"action": "Ignore", "onPodConditions": [disrupted]},
                ]
            },
            "template": template,
        },
    }
    return [service, job]


def _pytorchjob(pod: Pod) -> list[dict[str, Any]]:
    """Kubeflow's training operator, version 1; its PET_* variables tell a pod its place."""
    replica = {"restartPolicy": "OnFailure", "template": _template(pod, "pytorchjob", "Never")}
    del replica["template"]["spec"]["restartPolicy"]  # the replica's counts
    specs = {"Master": {"replicas": 1, **replica}}
    if pod.nodes > 1:
        specs["Worker"] = {"replicas": pod.nodes - 1, **replica}
    spec = {
        "nprocPerNode": str(pod.processes),
        "runPolicy": {"backoffLimit": pod.restarts * pod.nodes, "cleanPodPolicy": "Running"},
        "pytorchReplicaSpecs": specs,
    }
    head = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": pod.metadata}
    return [head | {"spec": spec}]


def _trainjob(pod: Pod) -> list[dict[str, Any]]:
    """Kubeflow's trainer, version 2; what its runtime has no key for is a patch of the runtime."""
    name = CONTAINER["trainjob"]
    patch = {
        "terminationGracePeriodSeconds": pod.save_s,
        "containers": [{"name": name, "volumeMounts": _mounts(pod)}],
        "volumes": _volumes(pod),
        **pod.more,
    }
    jobs = [{"name": name, "template": {"spec": {"template": {"spec": patch}}}}]
    runtime = {"template": {"spec": {"replicatedJobs": jobs}}}
    script = f"cd {shlex.quote(pod.workdir)} || exit 3\n{pod.script}" if pod.workdir else pod.script
    spec = {
        "runtimeRef": {"name": pod.runtime},
        "trainer": {
            "image": pod.image,
            "command": ["bash", "-c", script],
            "numNodes": pod.nodes,
            "numProcPerNode": pod.processes,
            "env": _env(pod),
            "resourcesPerNode": {"limits": dict(pod.limits)},
        },
        "runtimePatches": [{"manager": "mm.launch/run", "trainingRuntimeSpec": runtime}],
    }
    head = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": pod.metadata,
    }
    return [head | {"spec": spec}]
