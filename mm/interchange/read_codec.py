"""`mm import` of a codec or an image tokenizer: a tokenizer folder, for `mm data pack`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mm.config import validate
from mm.errors import UserError
from mm.interchange.check import load_peer
from mm.interchange.codecs.family import CodecReport, TokenizerFamily
from mm.interchange.family import SILENT, Settings
from mm.interchange.weights import Checkpoint, open_checkpoint
from mm.model import folder as files
from mm.model.weight_files import few_names
from mm.reading import parse_json
from mm.registry import CODECS, NETWORKS
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.network import TokenizerNetwork

log = logging.getLogger(__name__)
BEFORE = "preprocessor_config.json"
TOLERANCE = 1e-5  # of decoded samples in [-1, 1]


def import_codec(
    folder: Path, out: Path, c: Settings, *, check: bool = True, books: int | None = None
) -> CodecReport | None:
    """Write the codec of ``folder`` as a tokenizer folder.

    Args:
        c: config of the folder.
        check: compare codes and what they decode to with `transformers` before it is kept.
        books: codebooks to use; None: as many as the config says.
    Returns:
        What the comparison found; None without one.
    Raises:
        UserError: a file, a key or a tensor that does not fit, by name; nothing is written then.
    """
    family = CODECS.parse(c["model_type"])
    assert isinstance(family, TokenizerFamily)
    if family.inside is not None:
        if not isinstance(c[family.inside], Mapping):
            raise c.refuse(family.inside, "is no mapping")
        c = Settings(c[family.inside], f"{c.origin}: {family.inside}")
    before = read_preprocessor(folder)
    values = family.network(c, before, books)
    known = SILENT | family.silent_keys
    if unread := sorted(k for k in c if k not in c.asked and k not in known):
        log.warning("%s: nothing here reads %s", c.origin, few_names(unread, 20))
    config = validate(NETWORKS.get(family.network_kind), values, c.origin)
    try:
        with torch.device("meta"):
            net: Any = config.build()  # type: ignore[attr-defined]
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{c.origin}: makes no network ({what}); copy it again") from None
    assert isinstance(net, TokenizerNetwork)
    with open_checkpoint(folder) as given:
        net.load_state_dict(tensors_of(family, config, net, given), assign=True)
    with files.whole(out) as part:
        net.save_pretrained(part)
        if not check:
            return None
        report = family.compare(load_tokenizer(part), load_peer(folder, family.auto))
        if report.different or not report.difference <= TOLERANCE:
            raise UserError(
                f"{folder}: {report.different} of {report.codes} codes differ from transformers', "
                f"decoded values by {report.difference:.2g} (allowed {TOLERANCE:g}, they spread "
                f"over {report.spread:.2g}); go on unchecked with --no-check"
            )
        return report


def read_preprocessor(folder: Path) -> Settings:
    """`preprocessor_config.json`, empty where there is none. Raises UserError."""
    path = folder / BEFORE
    if not path.is_file():
        return Settings({}, str(path))
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it again") from None
    return Settings(values, str(path))


def tensors_of(
    family: TokenizerFamily, config: Any, net: TokenizerNetwork, given: Checkpoint
) -> dict[str, torch.Tensor]:
    """Our tensors, in float32.

    Raises UserError naming the keys that are missing, the keys that nobody reads, a tensor of
    another shape.
    """
    lines = list(family.entries(config))
    wanted = [name for line in lines for name in line.theirs]
    fits = lambda prefix: sum(f"{prefix}{name}" in given for name in wanted)
    prefix = max(family.prefixes, key=fits)
    here = {family.canonical(n.removeprefix(prefix)): n for n in given if n.startswith(prefix)}
    extra = [
        name
        for key, name in here.items()
        if key not in {*wanted} and not re.search(family.silent, key)
        if not family.is_spare(config, key)
    ]
    missing = [n for n in wanted if n not in here]
    if missing or extra:
        faults = [
            f"{what} {few_names(names)}"
            for what, names in (("lacks", missing), ("holds what no layer takes:", sorted(extra)))
            if names
        ]
        raise UserError(f"{given.origin}: {'; '.join(faults)}")
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    made: dict[str, torch.Tensor] = {}
    for line in lines:
        for name in line.theirs:
            given.dtype(here[name])  # refuses quantised weights by name
        try:
            joined = line.part.join([given[here[name]].float() for name in line.theirs])
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            what = " ".join(str(error).split())[:160]
            raise UserError(f"{given.origin}: {', '.join(line.theirs)}: {what}") from None
        for own, tensor in zip(line.own, joined, strict=True):
            if tuple(tensor.shape) != shapes[own]:
                raise UserError(
                    f"{given.origin}: {line.theirs[0]} makes {list(tensor.shape)} where "
                    f"config.json asks for {list(shapes[own])}: they are of different models"
                )
            made[own] = tensor.contiguous()
    if left := sorted(shapes.keys() - made.keys()):
        raise AssertionError(f"the family's table lacks {few_names(left)}")
    return made
