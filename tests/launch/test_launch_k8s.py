"""`mm launch k8s`: manifests against the models of the PyPI clients; the pods' script, run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import environment, steps_done, toy_run, wait_for

from mm.launch import start
from mm.launch.environment import free_port
from mm.launch.launcher import Job

SECRET = "k" * 40


def job_of(config: Path) -> Job:
    environ = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "NCCL_DEBUG": "INFO"}
    return Job(str(config), ("seed=3",), "My_run", config.parent / "My_run", environ, config.parent)


def objects(config: Path, *changes: str, nodes: int = 3) -> dict[str, dict[str, Any]]:
    """What kubectl would apply, by kind."""
    given = ("namespace=lab", "claims={data: /data}", "pod={nodeSelector: {gpu: h100}}", *changes)
    plan = start.cluster("k8s", None, given, nodes, 4).plan(job_of(config))
    assert SECRET not in plan.files["k8s.yaml"]
    return {part["kind"]: part for part in yaml.safe_load_all(plan.files["k8s.yaml"])}


def through(api: Any, values: dict[str, Any], model: str) -> Any:
    """Values as a client's model; a key that the model does not have would be lost on the way."""

    class Response:
        data = json.dumps(values)

    made = api.deserialize(Response, model)
    assert api.sanitize_for_serialization(made) == values
    return made


def check_pod(spec: Any, container: str) -> None:
    """What every pod has: volumes for runs and data, shared memory, W&B's secret by reference."""
    (only,) = spec.containers
    assert only.name == container and only.resources.limits == {"nvidia.com/gpu": "4"}
    at = {mount.name: mount.mount_path for mount in only.volume_mounts}
    volumes = {volume.name: volume for volume in spec.volumes}
    claims = {
        at[name]: volume.persistent_volume_claim.claim_name
        for name, volume in volumes.items()
        if volume.persistent_volume_claim
    }
    assert claims["/data"] == "data" and "runs" in claims.values()
    memory = next(v for v in volumes.values() if v.empty_dir)
    assert at[memory.name] == "/dev/shm" and memory.empty_dir.medium == "Memory"
    assert spec.node_selector == {"gpu": "h100"} and spec.termination_grace_period_seconds == 180
    check_env(only.env)


def check_env(env: Any) -> None:
    by_name = {variable.name: variable for variable in env}
    reference = by_name["WANDB_API_KEY"].value_from.secret_key_ref
    assert (reference.name, reference.key) == ("wandb", "api-key")
    assert by_name["NCCL_DEBUG"].value == "INFO" and "HF_TOKEN" not in by_name


def test_an_indexed_job_with_a_headless_service(tmp_path: Path) -> None:
    client = pytest.importorskip("kubernetes.client", reason="pip install kubernetes")
    api = client.ApiClient()
    found = objects(toy_run(tmp_path))
    service = through(api, found["Service"], "V1Service")
    job = through(api, found["Job"], "V1Job")
    config = through(api, found["ConfigMap"], "V1ConfigMap")
    assert service.spec.cluster_ip == "None" and job.metadata.namespace == "lab"
    assert (job.spec.completion_mode, job.spec.completions, job.spec.parallelism) == (
        "Indexed",
        3,
        3,
    )
    check_pod(job.spec.template.spec, "trainer")
    # pod i is named JOB-i.SERVICE where its subdomain is the service, and its labels select it
    first = {v.name: v.value for v in job.spec.template.spec.containers[0].env}["MASTER_ADDR"]
    assert first == f"{job.metadata.name}-0.{service.metadata.name}" == "my-run-0.my-run"
    assert job.spec.template.spec.subdomain == service.metadata.name
    assert service.spec.selector == {"job-name": job.metadata.name}
    assert yaml.safe_load(config.data["run.yaml"])["seed"] == 3


def test_kubeflows_pytorchjob(tmp_path: Path) -> None:
    client = pytest.importorskip("kubeflow.training.api_client", reason="kubeflow-training")
    values = objects(toy_run(tmp_path), "resource=pytorchjob")["PyTorchJob"]
    job = through(client.ApiClient(), values, "KubeflowOrgV1PyTorchJob")
    replicas = job.spec.pytorch_replica_specs
    assert {name: r.replicas for name, r in replicas.items()} == {"Master": 1, "Worker": 2}
    assert job.spec.nproc_per_node == "4"
    for replica in replicas.values():
        check_pod(replica.template.spec, "pytorch")
        assert "--node_rank=$PET_NODE_RANK" in replica.template.spec.containers[0].command[-1]
    alone = objects(toy_run(tmp_path), "resource=pytorchjob", nodes=1)["PyTorchJob"]
    assert set(alone["spec"]["pytorchReplicaSpecs"]) == {"Master"}


def test_kubeflows_trainjob(tmp_path: Path) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api")
    values = objects(toy_run(tmp_path), "resource=trainjob")["TrainJob"]
    job = models.TrainerV1alpha1TrainJob.from_dict(values)
    assert json.loads(job.to_json()) == values
    assert (job.spec.trainer.num_nodes, job.spec.trainer.num_proc_per_node) == (3, 4)
    check_env(job.spec.trainer.env)
    (patched,) = job.spec.runtime_patches[0].training_runtime_spec.template.spec.replicated_jobs
    pod = patched.template.spec.template.spec
    assert pod.node_selector == {"gpu": "h100"} and pod.termination_grace_period_seconds == 180
    names = {mount.name for mount in pod.containers[0].volume_mounts}
    assert names == {volume.name for volume in pod.volumes} and len(names) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("resource", ["job", "pytorchjob"])
def test_pods_train_save_when_they_are_evicted_and_go_on(tmp_path: Path, resource: str) -> None:
    """The command of the manifest's container as two processes, with what a cluster sets."""
    config = toy_run(tmp_path, steps=1_000_000, checkpoints={"every": 0})
    given = (f"resource={resource}", f"python={sys.executable}")
    plan = start.cluster("k8s", None, given, 2, 1).plan(job_of(config))
    found = {part["kind"]: part for part in yaml.safe_load_all(plan.files["k8s.yaml"])}
    own = tmp_path / "etc"
    own.mkdir()
    run = yaml.safe_load(found["ConfigMap"]["data"]["run.yaml"]) | {"name": "My_run"}
    if resource == "job":
        template = found["Job"]["spec"]["template"]
    else:
        template = found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    command = template["spec"]["containers"][0]["command"]
    command = [word.replace("/etc/mm", str(own)) for word in command]
    folder = tmp_path / "My_run"

    def pods() -> list[subprocess.Popen[str]]:
        (own / "run.yaml").write_text(yaml.safe_dump(run))
        prefix, port = ("" if resource == "job" else "PET_"), free_port()
        where = {f"{prefix}MASTER_ADDR": "127.0.0.1", f"{prefix}MASTER_PORT": str(port)}
        place = "JOB_COMPLETION_INDEX" if resource == "job" else "PET_NODE_RANK"
        return [
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment(**where, **{place: str(rank)}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank in range(2)
        ]

    both = pods()
    try:
        ready = lambda: steps_done(folder) > 5 or any(pod.poll() is not None for pod in both)
        wait_for(ready, 300, "first steps")
        both[1].send_signal(signal.SIGTERM)  # one is evicted: both save
        said = [pod.communicate(timeout=400)[0] for pod in both]
        assert both[1].returncode == 75, said
        saved = max(int(f.name.split("_")[1]) for f in (folder / "checkpoints").glob("step_*"))
        run["stages"][0]["budget"]["steps"] = saved + 4
        both = pods()
        said = [pod.communicate(timeout=400)[0] for pod in both]
        assert [pod.returncode for pod in both] == [0, 0], said
        assert f"run {saved + 4}/{saved + 4}" in said[0].replace("My_run", "run")
    finally:
        for pod in both:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
