"""Low-rank adapters in PEFT's format: one of our matrices is one of theirs, or several.

R rank, D width of what a matrix reads.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.errors import UserError
from mm.interchange.explicit import make_explicit
from mm.interchange.family import Family
from mm.interchange.parts import Part, Rows, Transposed
from mm.interchange.write import fitting
from mm.model.linears.lora import Lora
from mm.model.model import LmConfig
from mm.model.weight_files import few_names
from mm.registry import LINEARS
from mm.vocabulary import Vocabulary

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
LENGTH = ".lora_magnitude_vector"
BASE_MARK = "mm_base"  # metadata key: `base_mark` of the weights that it was trained on
SAMPLED = 4096  # elements of a tensor that its mark is made of
# Settings of PEFT that change what an adapter computes, and have no equal here.
REFUSED = (
    "modules_to_save lora_bias use_qalora use_bdlora alora_invocation_tokens "
    "trainable_token_indices target_parameters layer_replication velora_config arrow_config "
    "kasa_config monteclora_config megatron_config"
).split()


class Site(NamedTuple):
    """A matrix of ours that may have an adapter, and the matrices of the checkpoint it is."""

    ours: str
    theirs: tuple[str, ...]  # paths, one below the other
    rows: tuple[int, ...]  # of each
    d_in: int
    name: str  # what `targets` name it
    transposed: bool  # stored (d_in, d_out) there


class Piece(NamedTuple):
    """An adapter of one matrix of the checkpoint."""

    a: Tensor  # (R, D)
    b: Tensor  # (rows, R)
    scale: float
    length: Tensor | None  # (rows,) of DoRA


def with_adapters(lm: LmConfig, **lora: Any) -> LmConfig:
    """The model with adapters upon its matrices."""
    below = getattr(lm.linear, "base_layer", lm.linear).to_dict()
    linear = LINEARS.parse({"kind": "lora", "base_layer": below, **lora})
    return lm.model_copy(update={"linear": linear})


def plain(lm: LmConfig) -> LmConfig:
    """The model as a checkpoint has it: dense matrices, without adapters."""
    below = getattr(lm.linear, "base_layer", lm.linear)
    dense = below if below.kind == "dense" else LINEARS.parse("dense")
    return make_explicit(lm.model_copy(update={"linear": dense}))


def family_of(lm: LmConfig) -> Family:
    """The family that the base is of. Raises UserError where it has no equal."""
    return fitting(plain(lm))[0]


def sites(lm: LmConfig, vocabulary: Vocabulary) -> list[Site]:
    """Every matrix that can have an adapter. Raises UserError of a model without an equal."""
    base = plain(lm)
    with torch.device("meta"):
        module = with_adapters(base).build(vocabulary)
    found = {path: m for path, m in module.named_modules() if isinstance(m, Lora)}
    out = []
    for line in family_of(lm).entries(base):
        if len(line.own) > 1 or type(line.part) not in (Part, Rows, Transposed):
            continue  # pieces of several matrices: no pair of factors is of one of theirs
        [name] = list(line.own)
        ours = name.removesuffix(".weight")
        if ours == name or ours not in found:
            continue
        m = found[ours]
        rows = line.part.sizes if isinstance(line.part, Rows) else (m.lora_b.shape[0],)
        theirs = tuple(name.removesuffix(".weight") for name in line.theirs)
        turned = isinstance(line.part, Transposed)
        out.append(Site(ours, theirs, rows, m.lora_a.shape[1], m.name, turned))
    return out


def base_marks(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A short hash of each tensor of a base, whatever its precision and its adapters.

    It reads some elements of each tensor, as any training moves all of them.
    """
    out = {}
    for name, t in tensors.items():
        if name.endswith((".lora_a", ".lora_b", ".magnitude")):
            continue
        flat = t.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)].to(torch.bfloat16, copy=True)
        content = f"{tuple(t.shape)}".encode() + some.view(torch.uint8).numpy().tobytes()
        out[name.replace(".base.", ".")] = hashlib.sha256(content).hexdigest()[:16]
    return out


def base_mark(tensors: Mapping[str, Tensor]) -> str:
    """One hash of `base_marks`."""
    text = "\n".join(f"{k} {v}" for k, v in sorted(base_marks(tensors).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---- out ----


def to_peft(
    lm: LmConfig, tensors: Mapping[str, Tensor], vocabulary: Vocabulary, base: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`adapter_config.json` and the tensors of a model with adapters.

    Raises UserError where a matrix with an adapter is none of a checkpoint's.
    """
    lora: Any = lm.linear
    every = sites(lm, vocabulary)
    have = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    if alone := sorted(have - {site.ours for site in every}):
        raise UserError(f"adapters of {few_names(alone)} have no equal in PEFT's format")
    scale = lora.alpha / (sqrt(lora.rank) if lora.rs else lora.rank)
    pieces: dict[str, Piece] = {}
    turned = False
    for site in every:
        if site.ours in have:
            get = lambda part, at=site.ours: tensors.get(f"{at}.{part}")
            pieces |= zip(site.theirs, _parts(site, scale, get), strict=True)
            turned |= site.transposed
    ranks = {name: len(piece.a) for name, piece in pieces.items()}
    pieces = {name: piece for name, piece in pieces.items() if ranks[name]}
    if not pieces:
        raise UserError("every adapter is of rank 0: nothing was trained")
    most = Counter(ranks[name] for name in pieces).most_common(1)[0][0]
    whole = lora.rs and all(ranks[name] == lora.rank for name in pieces)
    other = {name: ranks[name] for name in pieces if ranks[name] != most}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": lora.alpha if whole else scale * most,
        "lora_dropout": lora.dropout,
        "use_rslora": bool(whole),
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": turned,
        "target_modules": _targets(pieces, family_of(lm), lm),
        "rank_pattern": other,
        "alpha_pattern": {name: scale * rank for name, rank in other.items()},
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    out = {}
    for name, piece in pieces.items():
        out[f"{PREFIX}{name}{A}"], out[f"{PREFIX}{name}{B}"] = piece.a, piece.b
        if piece.length is not None:
            out[f"{PREFIX}{name}{LENGTH}"] = piece.length
    return config, {k: v.detach().clone().contiguous() for k, v in out.items()}


def _parts(site: Site, scale: float, get: Any) -> list[Piece]:
    """Our adapter as those of each matrix it is; ranks that never had a value are left out."""
    a, b, length = get("lora_a"), get("lora_b"), get("magnitude")
    used = a.ne(0).any(1) | b.ne(0).any(0)
    a, b = a[used], b[:, used]
    below = b.split(site.rows)
    lengths = length.split(site.rows) if length is not None else [None] * len(below)
    own = [torch.ones(len(a), dtype=torch.bool)] * len(below)
    columns = torch.stack([part.ne(0).any(0) for part in below])
    if len(below) > 1 and bool((columns.sum(0) <= 1).all()) and columns.any():
        own = list(columns)  # each rank is of one of them: adapters that came one by one
    return [
        Piece(a[keep], part[:, keep], scale, some)
        for part, some, keep in zip(below, lengths, own, strict=True)
    ]


def _targets(pieces: Mapping[str, Piece], family: Family, lm: LmConfig) -> list[str]:
    """Last names of the matrices, or whole paths where not all of a last name are adapted."""
    names = {n.removesuffix(".weight") for line in family.entries(plain(lm)) for n in line.theirs}
    last = lambda name: name.rsplit(".", 1)[-1]
    partly = {last(name) for name in names - pieces.keys()}
    return sorted({name if last(name) in partly else last(name) for name in pieces})


# ---- in ----


def from_peft(
    config: Mapping[str, Any],
    given: Mapping[str, Tensor],
    lm: LmConfig,
    weights: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    origin: str,
) -> tuple[LmConfig, dict[str, Tensor]]:
    """The base with adapters, and their tensors by our names.

    Args:
        config: `adapter_config.json`.
        given: tensors of the adapter.
        lm: of the base.
        weights: of the base.
        origin: of the adapter, for messages.
    Raises:
        UserError: a setting or a tensor that does not fit, by name.
    """
    pieces = _pieces(config, given, origin)
    every = sites(lm, vocabulary)
    widths = {
        name: (rows, site.d_in)
        for site in every
        for name, rows in zip(site.theirs, site.rows, strict=True)
    }
    of = config.get("base_model_name_or_path") or "another model"
    for name, piece in pieces.items():
        if name not in widths:
            raise UserError(
                f"{origin}: it adapts {name}, which this base lacks: it is for another base ({of})"
            )
        found = (piece.b.shape[0], piece.a.shape[1])
        if found != widths[name] or piece.a.shape[0] != piece.b.shape[1]:
            raise UserError(
                f"{origin}: {name} is {list(found)} there and {list(widths[name])} in this base: "
                f"it is for another base ({of})"
            )
    dora = bool(config.get("use_dora"))
    joined = {s: got for s in every if (got := _join(s, pieces)) is not None}
    rank = max(len(piece.a) for piece in joined.values())
    scale = next(iter(joined.values())).scale
    tensors: dict[str, Tensor] = {}
    targets = {site.name for site in joined}
    for site in every:
        if site.name not in targets:
            continue
        like = next(iter(pieces.values())).a
        empty = Piece(like.new_zeros(0, site.d_in), like.new_zeros(sum(site.rows), 0), scale, None)
        piece = joined.get(site, empty)
        more = rank - len(piece.a)  # zeros on both sides: they take no gradient and stay
        a = torch.cat([piece.a, like.new_zeros(more, site.d_in)])
        b = piece.b * (piece.scale / scale) if piece.scale != scale else piece.b
        tensors[f"{site.ours}.lora_a"] = a
        tensors[f"{site.ours}.lora_b"] = torch.cat([b, like.new_zeros(len(b), more)], 1)
        if dora:
            tensors[f"{site.ours}.magnitude"] = _lengths(site, pieces, weights)
    rs = bool(config.get("use_rslora")) and all(len(p.a) == rank for p in joined.values())
    rs = rs and not config.get("alpha_pattern")
    lora = {
        "rank": rank,
        "alpha": float(config.get("lora_alpha", 8)) if rs else scale * rank,
        "rs": rs,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "dora": dora,
        "targets": sorted(targets),
    }
    return with_adapters(lm, **lora), tensors


def _pieces(
    config: Mapping[str, Any], given: Mapping[str, Tensor], origin: str
) -> dict[str, Piece]:
    """Adapters by the path of their matrix. Raises UserError."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{origin}: peft_type is {config.get('peft_type')!r}; only LORA has an equal"
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"{origin}: bias is {config['bias']!r}; only 'none' has an equal")
    for key in REFUSED:
        if config.get(key):
            raise UserError(f"{origin}: {key} = {str(config[key])[:60]} has no equal here")
    found: dict[str, dict[str, Tensor]] = {}
    left = []
    for name, tensor in given.items():
        ending = next((end for end in (A, B, LENGTH) if name.endswith(end)), None)
        if ending is None or not name.startswith(PREFIX):
            left.append(name)
        else:
            path = name.removeprefix(PREFIX).removesuffix(ending)
            found.setdefault(path, {})[ending] = tensor
    if left:
        raise UserError(f"{origin}: nothing takes its {few_names(sorted(left))}")
    wanted = {A, B, LENGTH} if config.get("use_dora") else {A, B}
    if bad := sorted(path for path, parts in found.items() if parts.keys() != wanted):
        raise UserError(f"{origin}: {few_names(bad)}: no whole adapter; copy it again")
    if not found:
        raise UserError(f"{origin}: it holds no adapter")
    if bad := sorted(p for p, t in found.items() if t[A].dim() != 2 or t[B].dim() != 2):
        raise UserError(f"{origin}: {few_names(bad)}: no matrices of low rank")
    for key in ("alpha_pattern", "rank_pattern"):
        for name in config.get(key) or {}:
            if not any(_fits(path, name) for path in found):
                raise UserError(f"{origin}: {key} names '{name[:80]}', which it does not adapt")
    out = {}
    for path, parts in found.items():
        rank = len(parts[A])
        alpha = float(_setting(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)))
        scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        out[path] = Piece(parts[A], parts[B], scale, parts.get(LENGTH))
    return out


def _setting(patterns: Any, path: str, default: Any) -> Any:
    """A value by a path or the end of one."""
    for key, value in (patterns or {}).items():
        if _fits(path, key):
            return value
    return default


def _fits(path: str, key: str) -> bool:
    return path == key or path.endswith(f".{key}")


def _join(site: Site, pieces: Mapping[str, Piece]) -> Piece | None:
    """The adapter of our matrix: one that all share, or one below the other."""
    given = [pieces.get(name) for name in site.theirs]
    there = [piece for piece in given if piece is not None]
    if not there:
        return None
    first = there[0]
    same = all(p.scale == first.scale and torch.equal(p.a, first.a) for p in there)
    if same and len(there) == len(given):
        return Piece(first.a, torch.cat([p.b for p in there]), first.scale, None)
    blocks = [
        piece.b * (piece.scale / first.scale) if piece is not None else first.b.new_zeros(rows, 0)
        for piece, rows in zip(given, site.rows, strict=True)
    ]
    return Piece(torch.cat([p.a for p in there]), torch.block_diag(*blocks), first.scale, None)


def _lengths(site: Site, pieces: Mapping[str, Piece], weights: Mapping[str, Tensor]) -> Tensor:
    """Lengths of rows, those of the base where nothing was learned."""
    base = weights.get(f"{site.ours}.weight")
    if base is None:
        raise UserError(f"{site.ours}: DoRA of a base that is no plain matrix cannot be imported")
    own: Sequence[Tensor] = base.float().norm(dim=1).split(site.rows)
    out = []
    for name, length in zip(site.theirs, own, strict=True):
        piece = pieces.get(name)
        out.append(length if piece is None or piece.length is None else piece.length.float())
    return torch.cat(out)
