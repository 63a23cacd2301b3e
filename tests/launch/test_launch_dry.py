"""`mm launch ... --dry-run`: what would be done, without a cluster; its scripts are shell."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from machines import ROOT, mm, toy_run
from typer.testing import CliRunner

from mm.cli.launch import app
from mm.errors import UserError
from mm.launch import predict, start
from mm.launch.launcher import Job, Node, Plan

JOB = Job(
    "run.yaml", ("seed=1",), "a run", Path("/shared/a run"), {"WANDB_API_KEY": "k"}, Path("/")
)
SHIPPED = "configs/quickstart/hybrid.yaml"
IMAGE = "{image: i.sqsh, mounts: ['/a:/b'], runtime: "
PLANS = {
    "local": (),
    "slurm": ("after_limit=requeue", "cpus_per_task=4"),
    "slurm chain": ("after_limit=chain", "attempts=3", f"container={IMAGE}pyxis}}"),
    "slurm array": ("after_limit=array", "attempts=3", f"container={IMAGE}apptainer}}"),
    "slurm console": ("interactive=true",),
    "mpi": (),
    "k8s": (),
    "k8s pytorchjob": ("resource=pytorchjob",),
    "k8s trainjob": ("resource=trainjob", "workdir=/work space"),
}


def plan_of(kind: str, *changes: str, job: Job = JOB, nodes: int = 2):
    words, nodes = (kind.split()[0], 1 if kind in ("local", "mpi") else nodes)
    return start.cluster(words, None, changes, nodes, 4).plan(job)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return JOB._replace(config=str(toy_run(tmp_path)))


@pytest.mark.parametrize("kind", PLANS)
def test_every_script_is_shell_and_holds_no_secret(kind: str, job: Job) -> None:
    plan = plan_of(kind, *PLANS[kind], job=job)
    for name, text in plan.files.items():
        if name.endswith((".sh", ".sbatch")):
            done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
            assert done.returncode == 0 and not done.stderr, done.stderr
        assert "WANDB_API_KEY=k" not in text and "value: k" not in text


def test_the_sbatch_file_has_its_options_and_a_container(job: Job) -> None:
    text = plan_of("slurm", *PLANS["slurm"], job=job).files["job.sbatch"]
    head = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue"} <= set(head)
    assert "--signal=B:USR1@180" in head and "--time=1440" in head and "--array" not in text
    assert "'--output=/shared/a run/launch/slurm-%j.out'" in head
    assert "srun --export=ALL --kill-on-bad-exit=1 --cpus-per-task=4 bash -c" in text
    text = plan_of("slurm array", *PLANS["slurm array"], job=job).files["job.sbatch"]
    assert "#SBATCH --array=1-3%1" in text
    assert "apptainer exec --nv --bind /a:/b i.sqsh bash -c" in text
    plan = plan_of("slurm chain", *PLANS["slurm chain"], job=job)
    assert "--container-image=i.sqsh --container-mounts=/a:/b bash -c" in plan.files["job.sbatch"]
    assert len(plan.commands) == 3 and "--dependency=afterok:{job}" in plan.commands[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("attempts=3",), "attempts: a job that requeues itself"),
        (("limit_min=3",), "save_before_s: must be below limit_min, 180 s"),
    ],
)
def test_settings_of_slurm_that_do_not_fit_are_refused(changes: tuple[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of("slurm", *changes)


def test_a_secret_itself_is_no_reference() -> None:
    with pytest.raises(UserError, match="SECRET/KEY, never the value"):
        plan_of("k8s", "secrets.HF_TOKEN=hf_abc")


def test_a_dry_run_prints_all_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    told = tmp_path / "told.json"
    words = ["slurm", SHIPPED, "--nodes", "2", "--dry-run", "--json", str(told)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for text in (
        "#SBATCH --nodes=2",
        "sbatch --parsable",
        "export NCCL_DEBUG=INFO",
        "global batch = 4 rows a micro-batch x 1 accumulated x 2 processes = 8 rows a step, 8 x ",
        "memory per GPU: not predicted: say which card the machines have: cluster.gpu=h100",
    ):
        assert text in done.output
    assert "k" * 40 not in done.output + told.read_text() and "***" in done.output
    values = json.loads(told.read_text())
    assert values["world"] == 2 and values["environment"]["WANDB_API_KEY"] == "***"
    assert list(tmp_path.iterdir()) == [told]


@pytest.mark.parametrize(
    ("kind", "nodes", "processes", "asked"),
    [("slurm", 2, 4, (2, 4)), ("local", None, 4, (1, 4)), ("mpi", None, 2, (1, 2))],
)
def test_a_prediction_is_of_the_machines_of_the_plan(
    kind: str, nodes: int | None, processes: int, asked: tuple[int, int]
) -> None:
    launcher = start.cluster(kind, None, ("gpu=h100",), nodes, processes)
    plan = launcher.plan(JOB)
    assert predict.shape(launcher, plan) == asked
    words = predict.command(JOB, launcher, plan, 1)
    assert words[3:6] == ["plan", "run.yaml", "seed=1"] and words[6:8] == ["--gpu", "h100"]
    assert words[-7:] == ["--stage", "1", "--no-longest", "--launches", "no", "--json", "-"]


def test_machines_that_are_not_alike_are_counted_by_process() -> None:
    nodes = tuple(Node(name, (), "", n) for name, n in (("a", 2), ("b", 1)))
    assert predict.shape(start.cluster("local", None, ()), Plan(3, {}, nodes)) == (3, 1)


@pytest.mark.slow
def test_a_dry_run_predicts_memory_and_says_why_it_cannot(tmp_path: Path) -> None:
    file, told = toy_run(tmp_path), tmp_path / "told.json"
    words = ("launch", "local", str(file), "--gpus-per-node", "2", "--dry-run")
    code, said = mm(*words, "cluster.gpu=h100", "--json", str(told), cwd=tmp_path)
    assert code == 0 and "stages.0: memory per GPU: " in said, said
    assert "of 80 GB: fits (predicted for h100 by mm plan" in said and "weights " in said
    found = json.loads(told.read_text())["memory"][0]
    assert found["gpus"] == 2 and found["memory.total_bytes"] > 0
    code, said = mm(*words, "cluster.gpu=h10", cwd=tmp_path)
    assert code == 0 and "Traceback" not in said
    assert "not predicted: --gpu h10: no such device; did you mean 'h100'?" in said
    assert not (tmp_path / "run").exists()


def test_where_slurm_is_not_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(app, ["slurm", SHIPPED])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "sbatch: No such file or directory; it must be on this machine"


def test_the_page_shows_the_file_that_is_written() -> None:
    job = Job(SHIPPED, (), "quickstart", Path("/shared/runs/quickstart"), {}, Path("/shared/mm"))
    written = plan_of("slurm", "python=python", job=job).files["job.sbatch"]
    page = (ROOT / "docs/how-to/launch.md").read_text(encoding="utf-8")
    assert f"```text\n{written}```\n" in page
