"""A small multi-modal run to break: its data and its processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mm.faults import child
from mm.launch import environment
from mm.specs import Encoded, ModalityTokenizer, TokenSpec

PATTERNS = {"attention": "attention", "hybrid": "rg_lru attention"}
TIMEOUT_S = 240.0


class Codes(ModalityTokenizer):
    """Bytes of a text, gray levels of an image: enough to make token shards without training."""

    def __init__(self, modality: str, n: int):
        self.spec = TokenSpec(modality, n, 1, fingerprint=f"faults-{modality}-{n}")

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        return [Encoded(self._ids(raw)) for raw in raws]

    def _ids(self, raw: Any) -> np.ndarray:
        n = self.spec.n_ids
        if isinstance(raw, str):
            return np.frombuffer(raw.encode(), np.uint8).astype(np.int32) % n
        return np.asarray(raw)[::4, ::4, 0].reshape(-1).astype(np.int32) * n // 256

    def decode(self, codes: Sequence[Encoded]) -> list[Any]:
        raise NotImplementedError("the runs of mm faults sample nothing")

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError("the runs of mm faults export no tokenizer")

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        raise NotImplementedError("the runs of mm faults export no tokenizer")


class Ended(NamedTuple):
    """How the processes of one run ended."""

    codes: list[int]  # exit codes by rank; negative = by that signal
    said: str  # their standard error, one after the other
    seconds: float


class Bench:
    """Makes the data once, starts training processes, compares what they leave.

    Processes are forked from one that has imported everything, so that a start costs a second.

    Args:
        on_gpu: they train on this machine's GPU, where it has one, alone; each is started anew, as
            a forked process cannot use CUDA. Else the GPU is hidden: CPU and gloo.
    """

    def __init__(self, root: Path, on_gpu: bool = False):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        if not on_gpu:
            # as the engine sets it, before anything imports DeepSpeed
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        environment.prepare()
        self.context: Any = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            self.context.set_forkserver_preload(
                ["mm.faults.warm", "mm.faults.inject", "mm.trainer.loop", "mm.data.streams.packed"]
            )
        self._wholes: dict[str, Path] = {}
        self._n = 0
        self.tokens = {name: self._shards(name) for name in ("both", "text", "image")}

    def _shards(self, name: str) -> Path:
        from PIL import Image

        from mm.data.pack.job import pack

        raw, out = self.root / f"raw-{name}", self.root / f"tokens-{name}"
        raw.mkdir()
        rng = np.random.default_rng(0)
        rows = []
        for i in range(64):
            row = {"key": f"s{i:03d}"}
            if name != "image":
                row["text"] = f"number {i} " * (1 + i % 3)
            if name != "text":
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(raw / f"{i}.png")
                row["image"] = f"{i}.png"
            rows.append(row)
        (raw / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizers = {"text": Codes("text", 64), "image": Codes("image", 16)}
        if name != "both":
            tokenizers = {name: tokenizers[name]}
        shared = {"vocabulary": self.root / "tokens-both/vocabulary.json"}
        extra: dict[str, Any] = shared if name != "both" else {}
        pack(raw / "rows.jsonl", out, tokenizers=tokenizers, progress=False, **extra)
        return out

    def data(self, name: str = "both", rows: int = 8, micro: int | None = None) -> dict[str, Any]:
        """Config of the packed stream over one of the shard folders."""
        return {
            "kind": "packed",
            "sources": [{"path": str(self.tokens[name])}],
            "seq_len": 48,
            "batch_size": rows,
            "micro_batch_size": micro,
            "block_samples": 32,
        }

    def config(
        self,
        name: str,
        *,
        steps: int = 6,
        zero: int = 1,
        pattern: str = "hybrid",
        micro: int | None = None,
        **change: Any,
    ) -> dict[str, Any]:
        """Config of a run; ``change`` merges into its top-level keys."""
        base: dict[str, Any] = {
            "name": name,
            "out": str(self.root / "runs"),
            "vocabulary": str(self.tokens["both"] / "vocabulary.json"),
            "model": {
                "kind": "lm",
                "d_model": 32,
                "backbone": {
                    "kind": "stack",
                    "depth": 2,
                    "pattern": PATTERNS[pattern],
                    "mixers": {"attention": {"heads": 2, "kv_heads": 1}},
                    "ffn": {"kind": "swiglu", "hidden": 64},
                    "block": {"kind": "prenorm", "dropout": 0.1},
                },
            },
            "stages": [
                {
                    "data": self.data(micro=micro),
                    "objective": "next_token",
                    "optimizer": {"kind": "adamw", "lr": 1e-2},
                    "schedule": {"warmup": 2},
                    "budget": {"steps": steps},
                    "allow_left_out": 1.0,  # the longest documents do not fit a row
                }
            ],
            "engine": {"zero_stage": zero, "precision": "fp32", "threads": 1},
            "checkpoints": {"every": 2, "keep_last": 9},
        }
        for key, value in change.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        return base

    def fresh(self, prefix: str) -> str:
        """A run name not used before."""
        self._n += 1
        return f"{prefix}-{self._n}"

    def folder(self, config: Mapping[str, Any]) -> Path:
        return Path(config["out"]) / config["name"]

    def train(
        self,
        config: Mapping[str, Any],
        *,
        world: int = 1,
        faults: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Ended:
        """Train in ``world`` processes and wait for all; one that does not end is killed (-9)."""
        spec = self._spec(config, world, faults or {}, env or {})
        return self._wait([(child.run, (spec, rank)) for rank in range(world)], spec, timeout_s)

    def call(self, config: Mapping[str, Any], name: str, *args: Any) -> Ended:
        """Call a function of `child` in a process of its own."""
        spec = self._spec(config, 1, {}, {})
        return self._wait([(child.call, (spec, name, *args))], spec, TIMEOUT_S)

    def _spec(
        self,
        config: Mapping[str, Any],
        world: int,
        faults: Mapping[str, Any],
        env: Mapping[str, str],
    ) -> dict[str, Any]:
        self._n += 1
        (self.root / "said").mkdir(exist_ok=True)
        return {
            "run": dict(config),
            "world": world,
            "faults": dict(faults),
            "env": {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", **env},
            "port": environment.free_port(),
            "said": str(self.root / "said" / str(self._n)),
        }

    def _wait(self, calls: Sequence[Any], spec: Mapping[str, Any], timeout_s: float) -> Ended:
        begun = time.monotonic()
        processes = [self.context.Process(target=target, args=args) for target, args in calls]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.1, timeout_s - (time.monotonic() - begun)))
            if process.is_alive():
                process.kill()
                process.join()
        said = ""
        for rank in range(len(processes)):
            path = Path(f"{spec['said']}.{rank}")
            said += path.read_text(errors="replace") if path.is_file() else ""
        codes = [p.exitcode if p.exitcode is not None else -9 for p in processes]
        return Ended(codes, said, time.monotonic() - begun)

    def whole(self, config: Mapping[str, Any], *, world: int = 1, **kw: Any) -> Path:
        """Folder of the unbroken run of the same config; trained once."""
        key = json.dumps([{**config, "name": ""}, world, sorted(kw)], sort_keys=True)
        if key not in self._wholes:
            unbroken = {**config, "name": self.fresh("whole")}
            ended = self.train(unbroken, world=world, **kw)
            if ended.codes != [0] * world:
                raise RuntimeError(f"the unbroken run ended with {ended.codes}: {ended.said}")
            self._wholes[key] = self.folder(unbroken)
        return self._wholes[key]

    def drop(self, config: Mapping[str, Any]) -> None:
        """Remove a run that is no longer needed."""
        shutil.rmtree(self.folder(config), ignore_errors=True)
