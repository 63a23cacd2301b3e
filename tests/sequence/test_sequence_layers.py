"""Law: every layer that says how processes may share a row gives what one process gives.

In one set of gloo processes for all layers, so that it costs seconds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from sequence_ranks import MASKS, VARIANTS, build, layout

from mm.model.context import Ctx
from mm.model.sequence import Unconnected
from mm.registry import FFNS, MIXERS
from mm.shard import Shard

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
HERE = Path(__file__).parent


def run(folder: Path, world: int, jobs: list[dict[str, Any]]) -> list[Any]:
    """What ``world`` processes found of every job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = [sys.executable, str(HERE / "sequence_ranks.py")]
    rest = [str(world), str(folder / "store"), str(folder / "jobs.json"), str(folder / "out.json")]
    logs = [open(folder / f"{rank}.log", "wb") for rank in range(world)]  # noqa: SIM115
    hashed = [env | {"PYTHONHASHSEED": str(rank)} for rank in range(world)]  # orders of sets
    children = [
        subprocess.Popen([*words, str(rank), *rest], env=hashed[rank], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [child.wait(600) for child in children]
    finally:
        for child, log in zip(children, logs, strict=True):
            child.kill()
            log.close()
    said = "\n".join((folder / f"{rank}.log").read_text()[-1500:] for rank in range(world))
    assert codes == [0] * world, said
    return json.loads((folder / "out.json").read_text())


def declared(name: str) -> Any:
    return build(name).caps.shard


SHARED = [name for name in VARIANTS if declared(name) is not None]
PASSING = [name for name in SHARED if declared(name) in ("carry", "halo")]
QUICK = [
    *(name for name in SHARED if name.startswith(("mixer:", "ffn:", "4 heads", "halo"))),
    "stack, recomputed hybrid",
]

MASKED = ("4 heads, 2 of keys", "4 heads, differential_attention", "mixer:attention")
IN_ORDER = [name for name in VARIANTS if name.startswith(("mixer:", "ffn:"))]


def equal(jobs: list[dict[str, Any]], found: list[Any]) -> None:
    wrong = [
        f"{j['name']}, {j['size']} processes, {j['dtype']}: {out['where']} off by {out['off']:.1e}"
        for j, out in zip(jobs, found, strict=True)
        if "refused" not in out and not out["off"] <= TOLERANCE[j["dtype"]]
    ]
    assert not wrong, "\n".join(wrong)


def job(name: str, size: int, dtype: str = "float64", **more: Any) -> dict[str, Any]:
    return {"do": "compare", "name": name, "size": size, "dtype": dtype, **more}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], Any]]:
    """All that the default suite asks of four processes."""
    four = [name for name in QUICK if name in PASSING or name.startswith("4 heads")]
    jobs = [job(name, 4 if name in four else 2) for name in QUICK]
    jobs += [job(name, 4, "float32") for name in QUICK[::3]]
    jobs += [job(n, 4, times=4) for n in QUICK if n in PASSING and n.startswith(("mixer", "ffn"))]
    jobs += [job(n, 4 if n in four else 2, mask=m) for n in MASKED for m in MASKS]
    jobs += [job(name, 2, fault=True) for name in QUICK if name in PASSING]
    jobs += [{"do": "collectives", "size": size} for size in (2, 4)]
    jobs += [{"do": "order", "size": 4, "name": name} for name in IN_ORDER]
    return list(zip(jobs, run(tmp_path_factory.mktemp("ranks"), 4, jobs), strict=True))


def chosen(quick: list[tuple[dict[str, Any], Any]], **wanted: Any) -> list[tuple[Any, Any]]:
    keys = ("do", "times", "fault", "mask", "size", "dtype")
    plain = {"do": "compare", "times": None, "fault": None, "mask": None} | wanted
    return [(j, out) for j, out in quick if all(j.get(k) == plain[k] for k in keys if k in plain)]


def test_a_layer_in_slices_gives_what_it_gives_whole(quick: Any) -> None:
    for dtype in TOLERANCE:
        pairs = chosen(quick, dtype=dtype)
        equal([j for j, _ in pairs], [out for _, out in pairs])
    ran = {j["name"] for j, out in chosen(quick, size=4) if "refused" not in out}
    assert set(PASSING) & set(QUICK) <= ran
    assert {name for name in QUICK if name.startswith("4 heads")} <= ran


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_that_of_the_whole_row(mask: str, quick: Any) -> None:
    pairs = chosen(quick, mask=mask)
    equal([j for j, _ in pairs], [out for _, out in pairs])
    assert "4 heads, 2 of keys" in {j["name"] for j, out in pairs if "refused" not in out}


def test_what_processes_pass_each_other_does_not_grow_with_the_row(quick: Any) -> None:
    short = {j["name"]: out for j, out in chosen(quick, size=4, dtype="float64")}
    for j, out in chosen(quick, times=4):
        assert out["bytes"] == short[j["name"]]["bytes"] > 0, j["name"]


def test_what_a_plan_counts_is_what_processes_pass(quick: Any) -> None:
    """A group whose other processes are not there counts the same bytes."""
    told = {j["name"]: out for j, out in chosen(quick, size=4, dtype="float64")}
    for name in ("4 heads, 2 of keys", "mixer:delta_rule", "mixer:rg_lru", "mixer:log_linear"):
        group, layer = Unconnected(), build(name)
        shard, own = Shard.of(layout(), 1, 4, group)
        x = torch.randn(*own.shape, laws.D, dtype=torch.float64, requires_grad=True)
        ids = (x[..., :1] > 0).int()
        layer(x, Ctx(own, laws.mask_of(layer), ids, seed=5, shard=shard)).y.sum().backward()
        assert group.sent.total() == told[name]["bytes"], name


def test_states_that_begin_anew_in_every_process_are_found(quick: Any) -> None:
    """No loss curve shows it (accelerate #4177, DeepSpeed #8114): the law above does."""
    found = chosen(quick, fault=True)
    assert len(found) > 15
    for j, out in found:
        assert out["off"] > 1e-3, j["name"]


def test_the_backward_of_every_collective_is_its_transpose(quick: Any) -> None:
    for _, out in chosen(quick, do="collectives"):
        assert len(out) == 4 and max(out.values()) < 1e-12, out


def test_gradients_are_ready_in_one_order_in_all_processes(quick: Any) -> None:
    """ZeRO from stage 2 on joins them as they come: two of a convolution once changed places."""
    found = chosen(quick, do="order")
    assert len(found) == len(IN_ORDER) and sum(out["n"] for _, out in found) > 200
    assert [(j["name"], out["first"]) for j, out in found if out["first"]] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_variant_in_slices(tmp_path: Path) -> None:
    jobs = [job(n, size, dtype) for n in SHARED for size in (2, 4) for dtype in TOLERANCE]
    jobs += [job(n, 2, mask=m) for n in SHARED if declared(n) == "ulysses" for m in MASKS]
    equal(jobs, run(tmp_path, 4, jobs))


def test_the_page_names_every_layer_by_the_way_it_shares() -> None:
    page = (laws.ROOT / "docs" / "how-to" / "sequence-parallel.md").read_text()
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    said = {
        cells[1].strip(" `"): set(re.findall(r"`(\w+)`", cells[4]))
        for cells in lines
        if len(cells) > 5
    }
    for prefix, registry in (("mixer", MIXERS), ("ffn", FFNS)):
        for kind in registry:
            way = declared(f"{prefix}:{kind}") or "no way"
            if prefix == "mixer" and kind == "mixed_heads":  # that of its parts
                way = "local"
            for other, names in said.items():
                assert (kind in names) == (other == way), f"{kind}: {way}, the page says {other}"


def test_every_way_to_share_is_known() -> None:
    ways = {declared(name) for name in VARIANTS}
    assert ways == {None, "local", "ulysses", "carry", "halo"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_bf16_slices_are_no_further_from_fp64_than_one_process(tmp_path: Path) -> None:
    """Of what is passed on; compared with fp64, since either is as far from it as the other."""
    names = [name for name in QUICK if name in PASSING]
    jobs = [{"do": "rounding", "name": n, "size": 2, "dtype": "bfloat16"} for n in names]
    for j, out in zip(jobs, run(tmp_path, 2, jobs), strict=True):
        assert out["several"] < 1.5 * out["one"] + 2e-3, (j["name"], out)
