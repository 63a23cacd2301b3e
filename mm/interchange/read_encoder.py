"""`mm import` of an encoder: an `encoder` adapter, for `init_from.surgery: graft_adapter`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm.config import validate
from mm.errors import UserError
from mm.interchange.check import TOLERANCE, load_peer
from mm.interchange.encoders.family import EncoderFamily
from mm.interchange.family import Settings
from mm.interchange.weights import open_checkpoint
from mm.model import folder as files
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.model.tensor_file import Planned
from mm.model.weight_files import few_names, write_weights
from mm.registry import ENCODERS


class HiddenReport(NamedTuple):
    """What a comparison of last hidden states found."""

    difference: float  # the largest
    states: int  # compared
    spread: float  # their standard deviation


def import_encoder(folder: Path, out: Path, c: Settings, *, check: bool = True) -> Any:
    """Write the encoder of ``folder`` as a saved adapter; its last projection begins fresh.

    Args:
        c: config of the folder.
        check: compare last hidden states with `transformers` before it is written.
    Raises:
        UserError: a file, a key or a tensor that does not fit, by name; nothing is written then.
    """
    family = ENCODERS.parse(c["model_type"])
    assert isinstance(family, EncoderFamily)
    if family.inside is not None:
        if not isinstance(c[family.inside], Mapping):
            raise c.refuse(family.inside, "is no mapping")
        c = Settings(c[family.inside], f"{c.origin}: {family.inside}")
    config = validate(EncoderAdapterConfig, family.adapter(c), c.origin)
    config, tokenizer = family.fit_reader(c, folder, config)
    with open_checkpoint(folder) as given, files.whole(out) as part:
        lines = list(family.entries(config))
        wanted = [name for line in lines if line.own for name in line.theirs]
        fits = lambda prefix: sum(f"{prefix}{name}" in given for name in wanted)
        prefix = max(family.prefixes, key=fits)
        missing = [f"{prefix}{name}" for name in wanted if f"{prefix}{name}" not in given]
        if missing:
            raise UserError(f"{folder}: lacks {few_names(missing)}")
        with torch.device("meta"):
            module = config.build(config.width)
        shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        dtype = given.dtype(f"{prefix}{wanted[0]}")
        plan = []
        for line in lines:
            join = lambda line=line: line.part.join([given[prefix + n] for n in line.theirs])
            for i, name in enumerate(line.own):
                make = lambda join=join, i=i: join()[i]
                plan.append(Planned(name, shapes[name], dtype, make))
        left = shapes.keys() - {p.name for p in plan} - {"out.weight", "out.bias"}
        if left:
            raise AssertionError(f"the family's table lacks {few_names(sorted(left))}")
        (part / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        write_weights(part, plan)
        tokenizer.save(part / "tokenizers" / family.modality)
        return compare_states(family, c, config, part, folder) if check else None


@torch.no_grad()
def compare_states(
    family: EncoderFamily, c: Settings, config: EncoderAdapterConfig, ours: Path, theirs: Path
) -> HiddenReport:
    """Compare last hidden states in float32. Raises UserError where they differ."""
    peer = load_peer(theirs, "AutoModel")
    values, given = family.probe(c, theirs)
    wanted = family.run(peer, given)
    found = hidden_states(config, files.load_tensors(ours), values)
    difference = float((wanted - found).abs().max())
    report = HiddenReport(difference, wanted.numel(), float(wanted.std()))
    if not difference <= TOLERANCE:
        raise UserError(
            f"{theirs}: last hidden states differ from transformers' by {difference:.2g} (allowed "
            f"{TOLERANCE:g}, they spread over {report.spread:.2g}); go on unchecked with --no-check"
        )
    return report


def hidden_states(config: EncoderAdapterConfig, tensors: dict[str, Tensor], values: Any) -> Tensor:
    """`(G, L, W)` what the encoder gives before its last projection."""
    adapter: Any = config.build(config.width)
    adapter.out = nn.Identity()
    adapter.load_state_dict(tensors, strict=True)
    return adapter.float().eval()(values, None).x
