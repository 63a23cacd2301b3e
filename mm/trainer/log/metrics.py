"""metrics.jsonl (flushed each step, the truth), and the sums of one step on the device."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mm.batch import Batch, Sum
from mm.data.batching.codebooks import flat_stream
from mm.data.modalities.base import modality_of_value, table
from mm.specs import Encoded
from mm.trainer.callbacks.base import Callback, Training
from mm.vocabulary import MASK, Vocabulary

LN2 = 0.6931471805599453
USAGE_DECAY, USAGE_SEEN = (
    0.97,
    0.05,
)  # a code counts as used for 100 steps after it was seen: 0.97 ** 100 = 0.048


class MetricsFile(Callback):
    """Append-only metrics.jsonl.

    On resume and on a return to a checkpoint, lines of later steps are cut: they will be made
    again.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self._cut(step)
        self._file = path.open("a", encoding="utf-8")

    def _cut(self, step: int) -> None:
        if self.path.is_file():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            temporary = self.path.with_name(self.path.name + ".part")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.path)

    def on_stage_start(self, trainer: Training) -> None:
        self.close()
        self._cut(trainer.step)
        self._file = self.path.open("a", encoding="utf-8")

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        self.write({"step": step, **metrics})

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line and flush it.

        Non-finite numbers are written as null, which every JSON reader takes.
        """
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl; a last line cut by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def all_reduce(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors of any shapes over the ranks in one collective.

    Of float32, or of float64 where one of them is that: counts up to 2**53 stay exact. One rank
    gets them as they are.
    """
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = torch.cat([t.detach().reshape(-1).to(wide) for t in tensors])
    dist.all_reduce(flat)
    return [
        part.view(t.shape).to(wide if t.dtype == wide else torch.float32)
        for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
    ]


class MetricSum:
    """Losses and aux of one network in one step: summed over micro-batches, then over ranks."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.aux: dict[str, Sum] = {}

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        for name, total in losses.items():
            total = total.detach().float()
            self.losses[name] = self.losses[name] + total if name in self.losses else total

    def add_aux(self, aux: Mapping[str, Sum]) -> None:
        for name, each in aux.items():
            each = each.detach()
            self.aux[name] = self.aux[name] + each if name in self.aux else each

    def reduce(self) -> None:
        """Sum over ranks, in place. The names are the same on all ranks: the same modules ran."""
        names, stats = sorted(self.losses), sorted(self.aux)
        parts = [self.losses[k] for k in names] + [t for k in stats for t in self.aux[k]]
        parts = all_reduce(parts)
        self.losses = dict(zip(names, parts, strict=False))
        rest = parts[len(names) :]
        self.aux = {k: Sum(rest[2 * i], rest[2 * i + 1]) for i, k in enumerate(stats)}


class CodebookUsage:
    """Codebook usage and perplexity over about the last 100 steps, from the histograms in aux."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def update(self, aux: Mapping[str, Sum]) -> dict[str, Tensor]:
        """Fold in this step's ``usage`` histograms, (Q, K) each; return 0-d device metrics."""
        out: dict[str, Tensor] = {}
        for name, each in aux.items():
            if name.rpartition(".")[2].rpartition("/")[2] != "usage":
                continue
            old = self._seen.get(name)
            seen = each.total if old is None else USAGE_DECAY * old + each.total
            self._seen[name] = seen
            p = seen / seen.sum(-1, keepdim=True).clamp_min(1e-12)
            prefix = "codebook" if name == "usage" else f"codebook/{name[:-6]}"
            out[f"{prefix}/usage"] = used = (seen > USAGE_SEEN).float().mean()
            out[f"{prefix}/dead_codes"] = (1 - used) * seen.numel()
            out[f"{prefix}/perplexity"] = torch.special.entr(p).sum(-1).exp().mean()
        return out


class BytesPerToken(Callback):
    """Raw bytes behind one target token of each modality, from decoding a run's first documents.

    An estimate for the training curve (a constant factor on it); the task `bits_per_byte` is exact.
    Bytes are UTF-8 of text, pixels x channels of images, 16-bit samples of audio; a span's end
    counts as a token.
    """

    # of text, enough for a few per cent; images and audio: a few, their ratio hardly varies
    DOCUMENTS = 256
    FEW = 8

    def __init__(self, documents: int = DOCUMENTS) -> None:
        self.documents = documents
        self.totals: dict[str, list[float]] = {}  # modality -> [documents, tokens, bytes]

    def load(self, totals: Mapping[str, Sequence[float]]) -> None:
        """Go on from the ``totals`` of a checkpoint."""
        self.totals = {k: list(v) for k, v in totals.items()}

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        """Add ``bits_per_byte/<modality>``, by the stream's own ratio or else by the estimate."""
        ratio = getattr(trainer.stream, "bytes_per_token", None)
        vocabulary, tokenizers = trainer.vocabulary, trainer.run.tokenizers
        if ratio is None and vocabulary is not None and tokenizers and trainer.is_main:
            self.observe(trainer.batches, vocabulary, trainer.tokenizers)
            ratio = self.ratio()
        for name, size in (ratio or {}).items():
            if f"loss/{name}" in metrics and size:
                metrics[f"bits_per_byte/{name}"] = metrics[f"loss/{name}"] / LN2 / size

    def observe(
        self, batches: Sequence[Batch], vocabulary: Vocabulary, tokenizers: Mapping[str, Any]
    ) -> None:
        """Add what the targets of these host batches hold, until enough was seen."""
        for modality in vocabulary.modalities:
            seen = self.totals.setdefault(modality, [0, 0, 0])
            raw = table().modalities.get(table().raw.get(modality, ""))
            limit = self.documents if raw is not None and raw.is_text else self.FEW
            values = vocabulary.spec(modality).continuous
            if values or modality not in tokenizers or seen[0] >= limit:
                continue
            span = vocabulary.range(modality)
            codes = [c for b in batches for c in _spans(b, vocabulary, span.begin, span.end)][
                : limit - int(seen[0])
            ]
            if not codes:
                continue
            raws = tokenizers[modality].decode(
                [Encoded((ids - span.first).astype(np.int32)) for ids in codes]
            )
            seen[0] += len(codes)
            seen[1] += sum(len(ids) + 1 for ids in codes)
            seen[2] += sum(modality_of_value(raw).n_bytes(raw) for raw in raws)

    def ratio(self) -> dict[str, float]:
        """Bytes per token of every modality seen."""
        return {m: size / tokens for m, (_, tokens, size) in self.totals.items() if tokens}


def _spans(b: Batch, vocabulary: Vocabulary, begin: int, end: int) -> list[np.ndarray]:
    """Codes of the whole spans ``begin .. end`` of a host batch, whatever their role."""
    out, ids, targets = [], b.ids.numpy(), b.targets.numpy()
    for places in np.where(ids == MASK, targets, ids):  # a hidden code is its own place's target
        row = flat_stream(places, vocabulary)
        stops = np.flatnonzero(row == end)
        for start in np.flatnonzero(row == begin):
            stop = stops[np.searchsorted(stops, start) :][:1]
            if len(stop):
                codes = row[start + 1 : stop[0]]
                out.append(codes[codes >= 0])  # values that stand inline are none
    return out


def tokens_by_modality(batches: Sequence[Batch], n_modalities: int) -> Tensor:
    """Places that hold a token, (n_modalities + 1,) float32; entry 0 counts control tokens.

    Host batches: no sync.
    """
    total = torch.zeros(n_modalities + 1)
    for b in batches:
        fields = b.layout.fields
        real = fields.modality[fields.document > 0].long().flatten()
        total += torch.bincount(real, minlength=n_modalities + 1)[: n_modalities + 1]
    return total


def of_step(facts: Mapping[str, Any], seconds: float, waited: float, stream: Any) -> dict[str, Any]:
    """The metrics of a step: its ``facts``, speed, times and what its stream says of it.

    ``facts["stream"]`` are the stream's counts, summed over the ranks.
    """
    row = dict(facts)
    counts = getattr(stream, "counts", {})
    totals = {k: int(n) for k, n in zip(counts, row.pop("stream", ()), strict=False)}
    stats = stream.summarize(totals) if totals else {}
    for unit in ("tokens", "items"):
        if f"{unit}/step" in row:
            row[f"perf/{unit}_per_second"] = row.pop(f"{unit}/step") / seconds
    return row | {"perf/step_seconds": seconds, "data/wait_seconds": waited} | of_stream(stats)


def skipped_networks(metrics: Mapping[str, Any]) -> list[str]:
    """Networks whose update was left out: their gradient norm is inf."""
    found = []
    for key, value in metrics.items():
        if key.endswith("/grad_norm") and not math.isfinite(value):
            name = key.removeprefix("optim").removesuffix("/grad_norm").lstrip("/")
            found.append(name or "model")
    return found


def of_stream(stats: Mapping[str, Any]) -> dict[str, float]:
    """What a stream's ``stats`` add to a line of metrics.jsonl.

    Figures of the step become ``data/<name>`` (such as ``data/padding_share``); shares and rejects
    of the run so far ``data/<name>/<key>``, such as ``data/token_shares/text`` (by modality),
    ``data/sample_shares/0`` and ``data/source_shares/0`` (samples and tokens by number of the
    source) and ``data/rejects/too_long``.
    """
    row: dict[str, float] = {}
    for name, value in stats.items():
        if isinstance(value, (int, float)):
            row[f"data/{name}"] = value
        elif isinstance(value, Mapping) and (name.endswith("_shares") or name == "rejects"):
            row |= {f"data/{name}/{key}": n for key, n in value.items()}
    return row


def n_items(batches: Sequence[Batch]) -> int:
    """Raw items (images, clips) in host batches."""
    return sum(len(values.length) for b in batches for values in list(b.values.values())[:1])
