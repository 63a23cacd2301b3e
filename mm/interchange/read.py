"""`mm import`: a folder in Hugging Face's layout to a saved model.

V ids of the checkpoint, D model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import validate
from mm.data.chat.template import JINJA
from mm.errors import UserError
from mm.interchange.check import Report, compare
from mm.interchange.family import Family, Settings
from mm.interchange.parts import Entry
from mm.interchange.weights import Checkpoint, open_checkpoint
from mm.model import folder as files
from mm.model.model import LmConfig
from mm.model.tensor_file import Planned
from mm.model.weight_files import few_names, write_weights
from mm.reading import parse_json
from mm.registry import CODECS, ENCODERS, FAMILIES
from mm.tokenizers.text.hf import BESIDE, FILE, ORIGIN, HfConfig, HfTokenizer
from mm.vocabulary import RESERVED, Vocabulary, extend_vocabulary

log = logging.getLogger(__name__)
TABLE, HEAD = "embedder.weight", "heads.tokens.weight"
TEXT = "text"
PLACES = "max_position_embeddings"
OLDER = "chat_template.json"


def import_model(folder: str | Path, out: str | Path, *, check: bool = True) -> Report | None:
    """Write the model of ``folder`` as a saved model, which `init_from` takes.

    Args:
        check: compare logits and a greedy continuation with `transformers` before it is written.
    Returns:
        What the comparison found; None without one.
    Raises:
        UserError: a file, a key or a tensor that does not fit, by name; nothing is written then.
    """
    folder, out = Path(folder), Path(out)
    c = read_settings(folder)
    family = family_of(c)
    lm = validate(LmConfig, family.model(c), c.origin)
    lm, readers = family.readers(c, folder, lm)
    tokenizer = read_tokenizer(folder, c, family)
    if unread := c.unread():
        log.warning("%s: nothing here reads %s", c.origin, few_names(unread, 20))
    vocabulary = extend_vocabulary([tokenizer.spec, *(each.spec for each in readers.values())])
    with open_checkpoint(folder) as found, files.whole(out) as part:
        given = found.by_names(family.rename)
        plan = plan_of(family, lm, vocabulary, given, tokenizer.config)
        files.write_config(part, lm.to_dict())
        vocabulary.save(part / "vocabulary.json")
        for modality, each in {TEXT: tokenizer, **readers}.items():
            each.save(part / "tokenizers" / modality)
        tied: Any = lm.heads["tokens"]
        write_weights(part, plan, aliases={HEAD: TABLE} if tied.tied else {})
        if not check:
            return None
        return compare(part, folder, auto=family.auto, media=family.media(folder, c, readers))


def read_settings(folder: Path) -> Settings:
    """`config.json`. Raises UserError."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, so no model in Hugging Face's layout")
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it again") from None
    c = Settings(values, str(path))
    if c.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantised; take the model before it was")
    return c


def family_of(c: Settings) -> Family:
    """The family that ``model_type`` names. Raises UserError listing those that there are."""
    kind = c["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise c.refuse("model_type", f"is none of: {', '.join([*FAMILIES, *ENCODERS, *CODECS])}")
    family = FAMILIES.parse(kind)
    assert isinstance(family, Family)
    return family


def read_tokenizer(folder: Path, outer: Settings, family: Family) -> HfTokenizer:
    """The tokenizer of the folder. Raises UserError when there is none."""
    if not (folder / FILE).is_file():
        raise UserError(
            f'{folder}: no {FILE}; write it with: python -c "from transformers import '
            f"AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    c = family.text(outer)
    V, eos = c.whole("vocab_size"), c.get("eos_token_id", [])
    known = lambda id: isinstance(id, int) and 0 <= id < V
    bos = c.get("bos_token_id")
    config = HfConfig(
        vocab_size=V,
        bos=bos if known(bos) else None,
        eos=[id for id in (eos if isinstance(eos, list) else [eos]) if known(id)],
    )
    beside = {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}
    if (older := folder / OLDER).is_file() and JINJA not in beside:
        beside |= read_older_template(older)
    known_of = {key: outer.get(key) for key in ("model_type", *family.origin)}
    known_of = {k: v for k, v in {**known_of, PLACES: c.get(PLACES)}.items() if v is not None}
    beside[ORIGIN] = (json.dumps(known_of) + "\n").encode()
    try:
        return HfTokenizer(config, (folder / FILE).read_bytes(), beside)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def read_older_template(file: Path) -> dict[str, bytes]:
    """A chat template as older processors store it. Raises UserError."""
    try:
        source = parse_json(file.read_bytes())["chat_template"]
        return {JINJA: source.encode()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{file}: no chat template ({error}); copy it again") from None


def shapes_of(lm: LmConfig, vocabulary: Vocabulary) -> dict[str, tuple[int, ...]]:
    """Shape of each of our tensors."""
    with torch.device("meta"):
        module = lm.build(vocabulary)
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def plan_of(
    family: Family,
    lm: LmConfig,
    vocabulary: Vocabulary,
    given: Checkpoint,
    tokens: HfConfig,
) -> list[Planned]:
    """What is written, tensor by tensor.

    Raises UserError naming the keys that are missing, the keys that nobody reads, a tensor of
    another shape.
    """
    shapes = shapes_of(lm, vocabulary)
    lines = list(family.entries(lm))
    table, head, _ = family.table
    tied: Any = lm.heads["tokens"]
    wanted = [name for line in lines if line.own for name in line.theirs] + [table]
    wanted += [] if tied.tied else [head]
    spare = {head} if tied.tied else set()  # a copy of the table that some files carry
    extra = sorted(
        n for n in given if n not in {*wanted, *spare} and not re.search(family.silent, n)
    )
    if left_out := [n for n in extra if family.is_unread(lm, n)]:
        said = "%s: nothing reads %s: left out"
        log.warning(said, given.origin, few_names(left_out, 20))
    extra = [n for n in extra if n not in left_out]
    missing = [n for n in wanted if n not in given]
    if missing or extra:
        faults = [
            f"{what} {few_names(names)}"
            for what, names in (("lacks", missing), ("holds what no layer takes:", extra))
            if names
        ]
        raise UserError(f"{given.origin}: {'; '.join(faults)}")
    if head in spare and head in given and not torch.equal(given[head], given[table]):
        raise UserError(f"{given.origin}: {head} differs from {table}, config.json ties them")

    plan: list[Planned] = []
    for name in (TABLE,) if tied.tied else (TABLE, HEAD):
        source, begin = (table, True) if name == TABLE else (head, False)
        if given.shape(source) != (tokens.vocab_size, lm.d_model):
            raise UserError(
                f"{given.origin}: {source} is {list(given.shape(source))}, config.json says "
                f"{[tokens.vocab_size, lm.d_model]}"
            )
        more = shapes[name][0] - tokens.vocab_size - RESERVED - 2  # begins and ends of values
        make = lambda s=source, more=more: rows_of(given[s], tokens, more)
        plan.append(Planned(name, shapes[name], given.dtype(source), make))
    for line in lines:
        join = lambda line=line: line.part.join([given[n] for n in line.theirs])
        for i, name in enumerate(line.own):
            make = lambda join=join, i=i: join()[i]
            plan.append(Planned(name, shapes[name], given.dtype(line.theirs[0]), make))
    require_all(shapes, plan, tied.tied)
    return plan


def require_all(shapes: Mapping[str, tuple[int, ...]], plan: list[Planned], tied: bool) -> None:
    """A family's table names each tensor of ours."""
    left = sorted(shapes.keys() - {p.name for p in plan} - ({HEAD} if tied else set()))
    if left:
        raise AssertionError(f"the family's table lacks {few_names(left)}")


def rows_of(table_VD: Tensor, tokens: HfConfig, more: int = 0) -> Tensor:
    """Our table of a checkpoint's: control ids, begin, end, then its own rows, and ``more``.

    A document begins with the row of its ``bos``, else ``eos``, and ends with that of ``eos``;
    what it has no id for is the mean of all rows, which a softmax leaves small.
    """
    mean = table_VD.mean(0, dtype=torch.float32).to(table_VD.dtype)[None]
    begin = tokens.bos if tokens.bos is not None else next(iter(tokens.eos), None)
    end = next(iter(tokens.eos), None)
    row = lambda id: mean if id is None else table_VD[id : id + 1]
    first = mean.expand(RESERVED, -1)
    return torch.cat([first, row(begin), row(end), table_VD, mean.expand(more, -1)])


__all__ = ["Entry", "import_model"]
