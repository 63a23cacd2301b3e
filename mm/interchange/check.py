"""Logits of a saved model beside those of `transformers` for the checkpoint. T tokens, V ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.batch import Batch, Values
from mm.errors import UserError
from mm.hashes import write_hashes
from mm.interchange.ids import ids_of
from mm.layout import Layout
from mm.model.model import Model

TOLERANCE = 1e-4  # of float32 logits
ROWS, LONG, STEPS = 2, 48, 8
BEFORE = 5  # ids before what is shown


class Media(NamedTuple):
    """What stands in each row of a probe besides text."""

    modality: str
    values: Values  # an item a row
    shown: Mapping[str, Tensor]  # the same, as `transformers` takes it
    token: int  # the checkpoint's id at its places


class Report(NamedTuple):
    """What a comparison found."""

    difference: float  # the largest between two logits
    logits: int  # compared
    spread: float  # standard deviation of the logits
    continued: int  # ids of the greedy continuation, equal in both


def require_peer() -> None:
    """Raise UserError where `transformers` is not installed."""
    if find_spec("transformers") is None:
        raise UserError(
            "nothing compares the logits, because transformers is not installed: pip install "
            "'mm-stack[peers]', or go on unchecked with --no-check"
        )


def require_peft() -> None:
    """Raise UserError where `peft` is not installed."""
    if find_spec("peft") is None:
        raise UserError(
            "nothing compares the logits, because peft is not installed: pip install "
            "'mm-stack[peers]', or go on unchecked with --no-check"
        )


def load_peer(folder: Path, auto: str, adapter: Path | None = None) -> Any:
    """`transformers`' model of a folder in float32, with an adapter of `peft`'s upon it.

    Raises UserError where it cannot load it.
    """
    require_peer()
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    import transformers

    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        peer = getattr(transformers, auto).from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            attn_implementation="eager",
            use_safetensors=True,
        )
        if adapter is not None:
            require_peft()
            import peft

            peer = peft.PeftModel.from_pretrained(peer, adapter)
        return peer.eval()
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it ({str(error)[:200]})") from error
    finally:
        transformers.logging.set_verbosity(quiet)


def compare(
    ours: Path,
    theirs: Path,
    ready: Callable[[Model], None] = lambda model: None,
    adapter: Path | None = None,
    *,
    auto: str = "AutoModelForCausalLM",
    media: Media | None = None,
) -> Report:
    """Compare a saved model with a folder in Hugging Face's layout, in float32 on the CPU.

    The probe: `ROWS` rows of `LONG` ids from a fixed seed, then `STEPS` greedy ids.

    Args:
        ready: what is done to our model first.
        adapter: a folder of PEFT's format, which `peft` puts upon theirs.
        auto: class of `transformers` that loads theirs.
        media: what else the probe shows, behind its first `BEFORE` ids.
    Raises:
        UserError: `transformers` is missing or cannot load the folder, or the two differ.
    """
    peer = load_peer(theirs, auto, adapter)
    if not (ours / "hashes.json").is_file():
        write_hashes(ours)  # of a folder that is being written: they are written again at its end
    model = Model.from_pretrained(ours).float()
    ready(model)
    report = _compare(model, peer, ids_of(ours, model.vocabulary).own(), media)
    if not report.difference <= TOLERANCE:
        raise UserError(
            f"{theirs}: logits differ from transformers' by {report.difference:.2g} (allowed "
            f"{TOLERANCE:g}, they spread over {report.spread:.2g}): what this family writes in its "
            "config is not all understood; go on unchecked with --no-check"
        )
    if report.continued < STEPS * ROWS:
        raise UserError(f"{theirs}: the greedy continuation differs from that of transformers")
    return report


@torch.no_grad()
def _compare(model: Model, peer: Any, own: Tensor, media: Media | None) -> Report:
    V = len(own)
    known = peer.config.get_text_config().to_dict()
    rope, most = known.get("rope_parameters") or {}, known.get("max_position_embeddings")
    if "long_factor" in rope:  # beyond the first length it is another function
        key = "original_max_position_embeddings"
        most = rope.get(key) or known.get(key) or most
    places = most or LONG + STEPS
    kept = 0 if media is None else int(media.values.length.max())
    long = max(1, min(LONG, places - STEPS - kept))
    probe = torch.randint(V, (ROWS, long), generator=torch.Generator().manual_seed(17))
    more: dict[str, Any] = {}
    if media is not None:
        probe = torch.where(probe == media.token, 0, probe)
        first, last = probe[:, : min(BEFORE, long // 2)], probe[:, min(BEFORE, long // 2) :]
        probe = torch.cat([first, probe.new_full((ROWS, kept), media.token), last], 1)
        more = dict(media.shown)
    wanted = peer(input_ids=probe, **more).logits.float()
    found = logits_of(model, probe, own, media)
    difference = float((wanted - found).abs().max())
    equal, ids = 0, probe
    for _ in range(STEPS):
        a = peer(input_ids=ids, **more).logits[:, -1].float()
        b = logits_of(model, ids, own, media)[:, -1]
        # Of two that are as likely either may be taken.
        taken = b.argmax(-1, keepdim=True)
        equal += int((a.gather(-1, taken) >= a.max(-1, keepdim=True).values - TOLERANCE).sum())
        ids = torch.cat([ids, a.argmax(-1, keepdim=True)], 1)
    return Report(difference, wanted.numel(), float(wanted.std()), equal)


def codes_of(model: Model) -> Tensor:
    """`(V,)` ids of our only modality, begin and end aside."""
    span = model.vocabulary.range(model.vocabulary.modalities[0])
    return torch.arange(span.first, span.stop)


def logits_of(
    model: Model, ids_BT: Tensor, own: Tensor | None = None, media: Media | None = None
) -> Tensor:
    """`(B, T, V)` logits over the checkpoint's ids, which are the ids ``own`` `(V,)` of ours.

    ``media``: of an item a row, whose places hold its token.
    """
    B, T = ids_BT.shape
    own = codes_of(model) if own is None else own
    ids, values = own[ids_BT].int(), {}
    if media is not None:
        there = ids_BT == media.token
        ids = torch.where(there, -1, ids)
        place = there.int().argmax(1).int() + torch.arange(B, dtype=torch.int32) * T
        given = media.values
        values = {media.modality: replace(given, place=place)}
    ids = ids[..., None]
    none = torch.full_like(ids, -1)
    batch = Batch(Layout.plain(B, T), ids, none, torch.zeros(B, T), values=values)
    dist: Any = model(batch, loss=False).heads["tokens"].dist
    return dist.logits.view(B, T, -1)[..., own]
