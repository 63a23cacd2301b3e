"""Tiny model, stream, two-network objective of the trainer's tests: `imports: [trainer_toys]`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm.batch import Batch, Sum, Values
from mm.config import Config
from mm.init_from import InitFromField
from mm.layout import Doc, Layout
from mm.model.layer import HeadOut, ModelOut
from mm.objectives.objective import LossTerm, Network, Objective
from mm.plug_point import Registry
from mm.registry import NETWORKS, OBJECTIVES, STREAMS, TASKS
from mm.specs import TokenSpec
from mm.tasks.base import Task
from mm.vocabulary import Vocabulary, extend_vocabulary


def vocabulary() -> Vocabulary:
    return extend_vocabulary(
        [TokenSpec("text", 20, fingerprint="t"), TokenSpec("image", 12, fingerprint="i")]
    )


@NETWORKS.register("toy_lm")
class ToyConfig(Config):
    kind: Literal["toy_lm"] = "toy_lm"
    d: int = 16
    dropout: float = 0.0
    spike_at: int = -1  # id that turns the hidden state to inf

    def build(self, vocabulary: Vocabulary | None = None) -> ToyLM:
        return ToyLM(self, vocabulary.size if vocabulary else 64)


class ToyLM(nn.Module):
    """Embedding, a decayed sum over the past, an MLP, a tied output.

    An image-only matrix and an EMA buffer.
    """

    def __init__(self, config: ToyConfig, n: int):
        super().__init__()
        self.config, self.n = config, n
        self.embed = nn.Embedding(n, config.d)
        self.norm = nn.LayerNorm(config.d)
        self.up = nn.Linear(config.d, 4 * config.d)
        self.down = nn.Linear(4 * config.d, config.d)
        self.image = nn.Linear(config.d, config.d)
        self.register_buffer("seen", torch.zeros(1, n))

    def init_weights(self) -> None:
        with torch.no_grad():
            self.embed.weight.normal_(0, 0.5)
            self.seen.zero_()

    def forward(self, batch: Batch, *, seed: int = 0, **_: Any) -> ModelOut:
        ids = batch.ids[..., 0].long().clamp_min(0)
        x = self.embed(ids)
        is_image = (batch.layout.fields.modality == 2)[..., None]
        x = torch.where(is_image, self.image(x), x)
        same = batch.layout.fields.document[:, :, None] == batch.layout.fields.document[:, None]
        T = ids.shape[1]
        past = torch.arange(T, device=ids.device)
        decay = (
            torch.where(past[:, None] >= past, 0.5 ** (past[:, None] - past).float(), 0.0) * same
        )
        h = x + self.down(
            torch.nn.functional.gelu(self.up(self.norm((decay @ x.float()).to(x.dtype))))
        )
        if self.config.dropout:
            h = torch.nn.functional.dropout(h, self.config.dropout, self.training)
        if self.config.spike_at >= 0:
            h = h + torch.where(ids == self.config.spike_at, float("inf"), 0.0)[..., None]
        places = batch.places["tokens"].long()
        target = batch.targets[..., 0].flatten()[places].long()
        flat = h.flatten(0, 1)[places].to(self.embed.weight.dtype)
        logits = torch.nn.functional.linear(flat, self.embed.weight)
        nll = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
        hist = torch.zeros(1, self.n, device=ids.device).index_add(
            1, target, torch.ones_like(nll)[None]
        )
        aux = {"usage": Sum(hist, hist.sum(1, keepdim=True))}
        return ModelOut(h, {"tokens": HeadOut(nll, None)}, None, {}, aux)

    def after_step(self, stats: Any) -> None:
        self.seen.mul_(0.9).add_(stats["usage"].total)

    def save_pretrained(
        self, folder: Path, *, vocabulary: Any = None, tokenizers: Any = None
    ) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_dict()))
        save_file(self.state_dict(), str(folder / "model.safetensors"))


def load_toy(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "model" / "model.safetensors"))


@STREAMS.register("toy")
class ToyStreamConfig(Config):
    """Global row r of step s is a pure function of (seed, s, r): half text, half image rows."""

    kind: Literal["toy"] = "toy"
    rows: int = 8
    micro: int = 8  # rows a micro-batch of one rank
    seq_len: int = 12
    by_rank: bool = (
        False  # first half of the rows text only, second half image only: a rank lacks a modality
    )
    spikes: tuple[int, ...] = ()  # steps whose first id is 17
    signal_at: int = -1  # this step's data come with a SIGTERM
    first: int = 0  # step that it begins with

    def build(self, *, vocabulary: Vocabulary, seed: int, rank: int, world: int) -> ToyStream:
        return ToyStream(self, vocabulary, seed, rank, world)

    def held_out(self, split: str) -> ToyStreamConfig:
        """Steps that no test trains on."""
        return self.model_copy(update={"first": 10_000, "signal_at": -1})


class ToyStream:
    def __init__(
        self, config: ToyStreamConfig, vocabulary: Vocabulary, seed: int, rank: int, world: int
    ):
        self.config, self.vocabulary = config, vocabulary
        self.seed, self.rank, self.world, self.step = seed, rank, world, config.first
        self.bytes_per_token = {"text": 2.0}
        self.epoch = 0.0

    def next(self) -> list[Batch]:
        c = self.config
        mine = c.rows // self.world
        rows = range(self.rank * mine, (self.rank + 1) * mine)
        batches = [self._batch(rows[i : i + c.micro]) for i in range(0, mine, c.micro)]
        if self.step == c.signal_at:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        self.step += 1
        return batches

    def _batch(self, rows: Any) -> Batch:
        c, T = self.config, self.config.seq_len
        ids = np.zeros((len(rows), T), np.int32)
        for i, r in enumerate(rows):
            rng = np.random.default_rng((self.seed, self.step, r))
            is_image = r >= c.rows // 2 if c.by_rank else r % 2
            span = self.vocabulary.range("image" if is_image else "text")
            first = int(rng.integers(span.first, span.stop))
            ids[i] = span.first + (first - span.first + np.arange(T) * 3) % (span.stop - span.first)
            if self.step in c.spikes and i == 0:
                ids[i, 0] = 17  # the end-of-text id, which no row holds otherwise
        modality = self.vocabulary.modality_of(ids)
        lengths = [T - r % 3 for r in rows]
        given = ((modality == 2) & (np.arange(T) < 4)).astype(np.int32)  # of image rows alone
        layout = Layout.from_rows(
            [
                [Doc(n, modality=m[:n], extra={"prefix": g[:n]})]
                for n, m, g in zip(lengths, modality, given, strict=True)
            ],
            T,
        )
        weight = np.zeros((len(rows), T), np.float32)
        for i, n in enumerate(lengths):
            weight[i, : n - 1] = 1
        targets = np.roll(ids, -1, axis=1)
        t = torch.from_numpy
        places = np.flatnonzero(weight).astype(np.int32)
        return Batch(
            layout,
            t(ids)[..., None],
            t(np.where(weight > 0, targets, -1))[..., None].int(),
            t(weight),
            {"tokens": t(places)},
            labels={
                "target_modality": t(
                    np.where(weight > 0, self.vocabulary.modality_of(targets), 0)
                ).int()
            },
            keys=tuple(f"row{r}" for r in rows),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def close(self) -> None:
        pass


@NETWORKS.register("toy_critic")
class ToyCriticConfig(Config):
    kind: Literal["toy_critic"] = "toy_critic"

    def build(self, vocabulary: Vocabulary | None = None) -> ToyCritic:
        return ToyCritic()


class ToyCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, batch: Batch, **_: Any) -> ModelOut:
        score = self.net(batch.values["h"].data)
        return ModelOut(score, {}, None, {}, {})


@OBJECTIVES.register("toy_gan")
class ToyGanConfig(Config):
    kind: Literal["toy_gan"] = "toy_gan"

    def build(self, vocabulary: Vocabulary) -> ToyGan:
        return ToyGan(vocabulary)


class ToyGan(Objective):
    """Next token plus a critic on the hidden states.

    Two networks, two micro-batch passes, a frozen block.
    """

    networks = {"critic": Network(ToyCriticConfig())}

    def __init__(self, vocabulary: Vocabulary):
        self.names = vocabulary.modalities

    def counts(self, b: Batch) -> dict[str, torch.Tensor]:
        n = b.weight.sum()
        return {"nll": n, "critic": n, "fool": n}

    def _scored(self, critic: Any, b: Batch, h: torch.Tensor) -> torch.Tensor:
        score = critic(Batch.of_values({"h": Values.items(h)})).hidden
        return (score[..., 0] * b.weight).sum()

    def terms(self, micros: Any, nets: Any, env: Any) -> Iterator[LossTerm]:
        last = len(micros) - 1
        with torch.no_grad():
            hs = [nets["model"](b).hidden for b in micros]
        for i, (b, h) in enumerate(zip(micros, hs, strict=True)):
            s = nets["critic"](Batch.of_values({"h": Values.items(h)})).hidden[..., 0]
            yield LossTerm({"critic": ((s - 1) ** 2 * b.weight).sum()}, "critic", i == last)
        with env.frozen("critic") as critic:
            for i, b in enumerate(micros):
                out = nets["model"](b)
                w = b.weight.flatten()[b.places["tokens"].long()]
                losses = {
                    "nll": (out.heads["tokens"].nll * w).sum(),
                    "fool": self._scored(critic, b, out.hidden),
                }
                yield LossTerm(losses, step=i == last)


@OBJECTIVES.register("toy_teacher")
class ToyTeacherConfig(Config):
    kind: Literal["toy_teacher"] = "toy_teacher"
    frozen: bool = False  # the teacher stays as it is
    given: InitFromField | None = None  # a folder that the teacher is
    copied: bool = False  # the teacher is the model as the stage begins with it

    def build(self, vocabulary: Vocabulary) -> ToyTeacher:
        return ToyTeacher(self)


class ToyTeacher(Objective):
    """Next token plus the squared distance to the hidden states of an average of the model."""

    def __init__(self, config: ToyTeacherConfig):
        teacher = Network(None, "ema", of="model", decay=0.8)
        if config.given is not None:
            teacher = Network(None, "frozen", init_from=config.given)
        elif config.copied:
            teacher = Network(None, "frozen", of="model")
        elif config.frozen:
            teacher = Network(ToyConfig(), "frozen")
        self.networks = {"teacher": teacher}

    def counts(self, b: Batch) -> dict[str, torch.Tensor]:
        return {"nll": b.weight.sum(), "near": b.weight.sum()}

    def terms(self, micros: Any, nets: Any, env: Any) -> Iterator[LossTerm]:
        for i, b in enumerate(micros):
            with torch.no_grad():
                wanted = nets["teacher"](b).hidden
            out = nets["model"](b)
            w = b.weight.flatten()[b.places["tokens"].long()]
            near = ((out.hidden - wanted) ** 2).mean(-1)
            losses = {"nll": (out.heads["tokens"].nll * w).sum(), "near": (near * b.weight).sum()}
            yield LossTerm(losses, step=i == len(micros) - 1)


@STREAMS.register("toy_images")
class ToyImagesConfig(Config):
    """Smooth random images, (G, 3, 32, 32)."""

    kind: Literal["toy_images"] = "toy_images"

    def build(self, *, seed: int) -> ToyImages:
        return ToyImages(seed)


class ToyImages:
    def __init__(self, seed: int):
        self.seed, self.step = seed, 0

    def next(self) -> list[Batch]:
        g = torch.Generator().manual_seed(1000 * self.seed + self.step)
        self.step += 1
        small = torch.rand(8, 3, 4, 4, generator=g)
        data = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")
        return [Batch.of_values({"image": Values.items(data)})]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def close(self) -> None:
        pass


@TASKS.register("toy_task")
class ToyTaskConfig(Task):
    """The sum of all weights of the model, and whatever ``act`` does."""

    act: ClassVar[Any] = None

    kind: Literal["toy_task"] = "toy_task"
    data: Path = Path("somewhere/toys")

    @classmethod
    def smallest(cls) -> ToyTaskConfig:
        return cls()

    def check(self, vocabulary: Any, tokenizers: Any) -> None:
        """It reads no data."""

    def evaluate(self, generator: Any, *, seed: int = 0) -> dict[str, Any]:
        if ToyTaskConfig.act is not None:
            ToyTaskConfig.act()
        total = sum(float(p.detach().double().sum()) for p in generator.model.parameters())
        return {"weights": total, "chance": 0.5}


def load_saved(folder: Path, device: Any = "cpu") -> Any:
    """Stands for `Generator.from_pretrained`, which knows no toy."""
    from mm.decoders.generate import Generator

    module = ToyLM(ToyConfig(), vocabulary().size)
    module.load_state_dict(load_toy(Path(folder).parent))
    return Generator(module, vocabulary(), {})


KINDS: tuple[tuple[Registry, type[Config]], ...] = (
    (NETWORKS, ToyConfig),
    (NETWORKS, ToyCriticConfig),
    (STREAMS, ToyStreamConfig),
    (STREAMS, ToyImagesConfig),
    (OBJECTIVES, ToyGanConfig),
    (OBJECTIVES, ToyTeacherConfig),
    (TASKS, ToyTaskConfig),
)


def register() -> None:
    """Put the toys (back) into the registries."""
    for registry, cls in KINDS:
        registry.register(cls.model_fields["kind"].default)(cls)


def forget() -> None:
    """Take the toys out, so that the laws of other test files do not run over them."""
    for registry, cls in KINDS:
        registry._modules.pop(cls.model_fields["kind"].default, None)
        registry._classes.pop(cls.model_fields["kind"].default, None)


@pytest.fixture(autouse=True, scope="module")
def toys_registered() -> Iterator[None]:
    """Import this name into a test module that trains toys."""
    register()
    yield
    forget()
