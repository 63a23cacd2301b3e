"""Clock, folder of runs, GPUs and secrets of every node."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.launch.preflight.check import (
    ALL,
    FIX,
    OK,
    WARN,
    Asked,
    Row,
    Seen,
    common,
    leave_out,
    n_bytes,
)

SKEW_WARN_S, SKEW_FIX_S = 1.0, 5.0
FREE_FIX, FREE_WARN = 1 << 30, 20 << 30
SLOW_WRITE = 20e6  # bytes a second
SAMPLE = 8 << 20
QUERY = "index,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
PRESENT = "/proc/driver/nvidia/gpus"


def read_clock(asked: Asked, told: Mapping[int, Any]) -> float:
    """Seconds since 1970; how far off it is, the machine that asks measures by the way there."""
    return time.time()


def judge_clock(seen: Seen) -> Iterator[Row]:
    """Clocks of nodes against the middle of all, this machine's among them."""
    middle = statistics.median([0.0, *seen.skew_s.values()])
    off = {i: skew - middle for i, skew in seen.skew_s.items()}
    for i, skew in off.items():
        if abs(skew) > SKEW_WARN_S:
            light = FIX if abs(skew) > SKEW_FIX_S else WARN
            said = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the others"
            host = seen.hosts[i]
            sync = "timedatectl set-ntp true; chronyc makestep"
            yield Row("clock", host.name, light, said, host.on(sync))
    if abs(middle) > SKEW_WARN_S:
        said = f"{abs(middle):.1f} s {'behind' if middle > 0 else 'ahead of'} the nodes"
        yield Row("clock", "this machine", WARN, said, "timedatectl set-ntp true")
    if off and all(abs(skew) <= SKEW_WARN_S for skew in off.values()):
        spread = max(off.values()) - min(off.values())
        yield Row("clock", ALL, OK, f"within {spread:.2f} s of each other")


def write_folder(asked: Asked, told: Mapping[int, Any]) -> dict[str, Any]:
    """Write, sync and rename where runs are written; leave a token in every place that may do."""
    found = _write(Path(asked.folder), asked, SAMPLE)
    elsewhere = [Path.cwd() / "runs", Path.home() / "runs", Path("/var/tmp/runs")]
    others = {str(p): _write(p, asked, 1 << 16) for p in elsewhere if str(p) != asked.folder}
    return found | {"others": others}


def list_folder(asked: Asked, told: Mapping[int, Any]) -> dict[str, list[int]]:
    """Whose tokens are seen, by folder."""
    mine = told.get(asked.rank) or {}
    seen = {}
    for folder in (asked.folder, *mine.get("others", ())):
        place = _place(Path(folder), asked)
        seen[folder] = sorted(int(p.name) for p in place.glob("[0-9]*") if p.name.isdigit())
    return seen


def clear_folder(asked: Asked, told: Mapping[int, Any]) -> None:
    """Remove the tokens, and folders that were made for them."""
    for folder in told.get(asked.rank) or ():
        place = _place(Path(folder), asked)
        with contextlib.suppress(OSError):
            (place / str(asked.rank)).unlink(missing_ok=True)
            made = [p.name for p in place.iterdir()] == [MADE]
            if made:
                (place / MADE).unlink()
            place.rmdir()
            if made:
                place.parent.rmdir()  # holds something: stays


def judge_folder(seen: Seen) -> Iterator[Row]:
    """One folder, seen by all, written by all, with room and speed."""
    wrote, listed = seen.of("folder"), seen.of("folder", 1)
    bad = False
    for i, value in wrote.items():
        host, folder = seen.hosts[i], value["folder"]
        if value["errno"]:
            bad = True
            full = value["errno"] in ("ENOSPC", "EDQUOT")
            said = f"{folder}: {value['why']}"
            yield Row("folder", host.name, FIX, said, _mend(seen, i, full))
        elif value["free"] < FREE_FIX:
            bad = True
            said = f"{folder}: {n_bytes(value['free'])} free, a checkpoint is written whole"
            yield Row("folder", host.name, FIX, said, _mend(seen, i, True))
        elif value["free"] < FREE_WARN or value["rate"] < SLOW_WRITE:
            said = f"{n_bytes(value['free'])} free, written at {n_bytes(value['rate'])}/s"
            yield Row("folder", host.name, WARN, said, host.on(f"df -h {shlex.quote(folder)}"))
    fine = {i for i, value in wrote.items() if not value["errno"]}
    most = (
        common({i: tuple(listed[i].get(wrote[i]["folder"], ())) for i in fine & set(listed)})
        if fine & set(listed)
        else ()
    )
    for i in sorted(fine & set(listed)):
        mine = set(listed[i].get(wrote[i]["folder"], ()))
        missing = [seen.hosts[j].name for j in sorted(fine - mine)]
        if missing and (tuple(sorted(mine)) != most or len(fine) == 2):
            bad = True
            said = f"{wrote[i]['folder']}: does not show what {', '.join(missing[:3])} wrote there"
            yield Row("folder", seen.hosts[i].name, FIX, said, _mend(seen, i, False))
    if fine and not bad:
        slowest = min(wrote[i]["rate"] for i in fine)
        free = min(wrote[i]["free"] for i in fine)
        said = f"shared, {n_bytes(free)} free, renames whole, {n_bytes(slowest)}/s or more"
        yield Row("folder", ALL, OK, f"{wrote[min(fine)]['folder']}: {said}")


def _mend(seen: Seen, node: int, full: bool) -> str:
    """A folder that all hosts write and see, else the command that shows or mends this one."""
    wrote, listed = seen.of("folder"), seen.of("folder", 1)
    everyone = sorted(wrote)
    value, host = wrote[node], seen.hosts[node]
    if value["errno"] == "EROFS" and value["remount"]:
        return host.on(value["remount"])
    for place, found in value["others"].items():
        every = [wrote[i]["others"].get(place) for i in everyone]
        if found["errno"] or not all(v and not v["errno"] and v["free"] > FREE_FIX for v in every):
            continue
        if all(listed.get(i, {}).get(place) == everyone for i in everyone):
            return f"out={place}"
    folder = shlex.quote(value["folder"])
    if value["errno"] in ("EACCES", "EPERM"):
        return host.on(f"sudo mkdir -p {folder} && sudo chown -R {value['user']} {folder}")
    show = f"du -xhd 2 {folder} | sort -h | tail" if full else f"findmnt -T {folder}"
    return host.on(show)


MADE = "made"  # a file beside the tokens: the folder was not there before


def _place(folder: Path, asked: Asked) -> Path:
    return folder / f".mm-preflight-{asked.nonce}"


def _write(folder: Path, asked: Asked, size: int) -> dict[str, Any]:
    """Try a folder: error, bytes free, bytes a second."""
    out: dict[str, Any] = {"folder": str(folder), "errno": "", "why": "", "free": 0, "rate": 0.0}
    out |= {"user": os.environ.get("USER") or str(os.getuid()), "remount": ""}
    place = _place(folder, asked)
    try:
        made = not folder.exists()
        place.mkdir(parents=True, exist_ok=True)
        if made:
            (place / MADE).touch()
        part, whole = place / f"{asked.rank}.part", place / str(asked.rank)
        try:
            begun = time.monotonic()
            with part.open("wb") as file:
                for _ in range(size >> 16):
                    file.write(os.urandom(1 << 10) * 64)
                file.flush()
                os.fsync(file.fileno())
            out["rate"] = size / max(1e-9, time.monotonic() - begun)
            whole.write_bytes(b"old")
            part.replace(whole)  # over the old one, as a checkpoint's pointer
            if whole.stat().st_size != size or part.exists():
                raise OSError(errno.EIO, "a rename over a file is not whole")
            whole.write_bytes(b"")
        finally:
            part.unlink(missing_ok=True)
        out["free"] = shutil.disk_usage(folder).free
    except OSError as error:
        out["errno"] = errno.errorcode.get(error.errno or 0, "EIO")
        out["why"] = error.strerror or str(error)
        out["remount"] = _remount(folder)
    return out


def _remount(folder: Path) -> str:
    """The command that makes the mount of a folder writable; '' where it is that already."""
    best: list[str] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split()
            point = words[4].encode().decode("unicode_escape")  # blanks are \040
            if folder.is_relative_to(point) and (not best or len(point) >= len(best[4])):
                best = [*words[:4], point, *words[5:]]
    if not best or "ro" not in best[5].split(","):
        return ""
    bind = "" if "ro" in best[-1].split(",") else "bind,"
    return f"mount -o remount,{bind}rw {shlex.quote(best[4])}"


def read_gpus(asked: Asked, told: Mapping[int, Any]) -> dict[str, Any]:
    """GPUs by nvidia-smi, and how many the driver has."""
    in_driver = len(list(Path(PRESENT).glob("*"))) if Path(PRESENT).is_dir() else 0
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"gpus": [], "in_driver": in_driver, "why": "", "asked": asked.processes}
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        why = "nvidia-smi does not answer"
        return {"gpus": [], "in_driver": in_driver, "why": why, "asked": asked.processes}
    names = [field.split(".")[-2] if "ecc" in field else field for field in QUERY.split(",")]
    rows = [
        dict(zip(names, map(str.strip, line.split(",")), strict=False))
        for line in done.stdout.splitlines()
        if line.count(",") >= 4
    ]
    why = "" if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())[:200]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        rows = [row for row in rows if row["index"] in visible.split(",")]
    return {"gpus": rows, "in_driver": in_driver, "why": why, "asked": asked.processes}


def judge_gpus(seen: Seen) -> Iterator[Row]:
    """As many as processes are asked for, one driver, no errors of memory, nobody else on them."""
    found = seen.of("gpus")
    if not any(v["gpus"] or v["in_driver"] or v["why"] for v in found.values()):
        yield Row("gpus", ALL, OK, "none on any host: training on CPUs")
        return
    drivers = {i: v["gpus"][0]["driver_version"] for i, v in found.items() if v["gpus"]}
    driver = common(drivers) if drivers else ""
    bad = False
    for i, value in found.items():
        host, gpus = seen.hosts[i], value["gpus"]
        has = len(gpus)
        problems = []
        if value["why"]:
            problems.append((FIX, value["why"], leave_out(host)))
        elif has < value["asked"]:
            lost = max(0, value["in_driver"] - has)
            said = f"{has} GPUs, {value['asked']} processes" + (f"; {lost} lost" if lost else "")
            mend = f"cluster.gpus_per_node={has}" if has else leave_out(host)
            problems.append((FIX, said, mend))
        if drivers.get(i, driver) != driver:
            said = f"driver {drivers[i]}, others {driver}"
            problems.append((WARN, said, host.on("nvidia-smi")))
        for gpu in gpus:
            errors = gpu.get("uncorrected", gpu.get("volatile", "0"))
            if errors.isdigit() and int(errors):
                said = f"GPU {gpu['index']}: {errors} uncorrected errors of memory"
                reset = host.on(f"nvidia-smi --gpu-reset -i {gpu['index']}")
                problems.append((FIX, said, reset))
            used, total = gpu["memory.used"], gpu["memory.total"]
            if used.isdigit() and total.isdigit() and int(used) > 0.05 * int(total):
                said = f"GPU {gpu['index']}: {used} of {total} MiB are taken already"
                processes = "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"
                problems.append((WARN, said, host.on(processes)))
        bad = bad or bool(problems)
        yield from (Row("gpus", host.name, *problem) for problem in problems)
    if not bad:
        counts = {len(v["gpus"]) for v in found.values()}
        kinds = {gpu["name"] for v in found.values() for gpu in v["gpus"]}
        said = f"{'/'.join(map(str, sorted(counts)))} a host, {', '.join(sorted(kinds))}"
        yield Row("gpus", ALL, OK, f"{said}, driver {driver}")


def read_secrets(asked: Asked, told: Mapping[int, Any]) -> dict[str, bool]:
    """Whether there are credentials for W&B; never what they are."""
    with contextlib.suppress(OSError):
        if "api.wandb.ai" in (Path.home() / ".netrc").read_text():
            return {"wandb": True}
    return {"wandb": bool(os.environ.get("WANDB_API_KEY"))}


def judge_secrets(seen: Seen) -> Iterator[Row]:
    """The first rank alone speaks to W&B."""
    found, config = seen.of("secrets"), seen.of("config")
    if 0 not in found:
        return
    host, wanted = seen.hosts[0], bool(config.get(0, {}).get("online"))
    if found[0]["wandb"]:
        yield Row("secrets", host.name, OK, "a key for W&B is there")
    elif wanted:
        said = "tracking.mode is online and there is no key for W&B (wandb login there, or offline)"
        yield Row("secrets", host.name, FIX, said, "tracking.mode=offline")
    else:
        yield Row("secrets", host.name, OK, "no key for W&B: runs stay offline")
