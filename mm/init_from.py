"""`init_from`: the trained weights that a network begins with, as a YAML says them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, WrapSerializer

from mm.config import Config
from mm.errors import UserError
from mm.reading import parse_json
from mm.registry import SurgeryField

Patterns = tuple[str, ...]


class InitFrom(Config):
    """A folder with weights, and what need not fit; a bare path is short for ``{path: ...}``.

    Everything that does not fit is refused by name unless a key here allows it. Patterns are globs
    over names of parameters, such as ``backbone.layers.1.*``.
    """

    path: Annotated[
        Path, Field(description="a run, or a saved model: the folder that holds model.safetensors")
    ]
    network: Annotated[
        str,
        Field(
            description="which network of the run: `model`, or one that its objective named, which "
            "is then read from the newest checkpoint"
        ),
    ] = "model"
    adapters: Annotated[
        Path | None,
        Field(
            description="adapters that are put upon these weights: a run of `linear: lora` or its "
            "adapters.safetensors, or a folder that PEFT wrote"
        ),
    ] = None
    surgery: Annotated[
        tuple[SurgeryField, ...],
        Field(description="operations on the weights, in order, before they must fit"),
    ] = ()
    allow_missing: Annotated[
        Patterns, Field(description="parameters that the folder lacks: they begin fresh")
    ] = ()
    allow_unexpected: Annotated[
        Patterns, Field(description="tensors of the folder that the network lacks: they are left")
    ] = ()
    allow_mismatched: Annotated[
        Patterns, Field(description="parameters of another shape there: they begin fresh")
    ] = ()
    vocabulary: Annotated[
        Literal["extended", "matched"],
        Field(
            description="extended: the old vocabulary must be the beginning of the new one; "
            "matched: rows of ids are taken by modality, where both have the same tokenizer, and "
            "all others begin fresh"
        ),
    ] = "extended"


def folders(value: Any) -> Iterator[InitFrom]:
    """Every InitFrom below a config, such as a run's own and those of its objectives."""
    if isinstance(value, InitFrom):
        yield value
    elif isinstance(value, Config):
        for name in type(value).model_fields:
            yield from folders(getattr(value, name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from folders(inner)


def with_saved_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's values whose `model` is that of the folder of `init_from`, where it has no `kind`.

    What such a `model` says is put upon the saved one, mapping by mapping; one with a kind stands
    for itself. Surgery changes the weights alone: what it makes is said in `model`; but an adapter
    that is grafted brings its own config, where `model` has none for its modality.

    Raises:
        UserError: there is no saved model, or its config is damaged.
    """
    given, asked = values.get("model"), _read(values.get("init_from"))
    whole = given is not None and not (isinstance(given, Mapping) and "kind" not in given)
    if whole or not isinstance(asked, Mapping) or asked.get("network", "model") != "model":
        return dict(values)
    path = Path(str(asked.get("path")))
    file = next((f for d in ("model", "") if (f := path / d / "config.json").is_file()), None)
    if file is None:
        raise UserError(
            f"init_from: {path} holds no saved model (config.json) whose `model` could be taken; "
            "name a run that has ended or a saved model, or write `model`"
        )
    try:
        saved = parse_json(file.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy it again") from error
    return {**values, "model": _onto(_with_grafts(saved, asked.get("surgery")), given or {})}


def _with_grafts(saved: Any, surgery: Any) -> Any:
    """A saved model's config with the adapters that are grafted. Raises UserError."""
    for each in surgery if isinstance(surgery, list | tuple) else ():
        if not isinstance(each, Mapping) or each.get("kind") != "graft_adapter":
            continue
        file = Path(str(each.get("path"))) / "config.json"
        if not file.is_file() or not isinstance(saved, Mapping):
            continue  # the operation itself says what is wrong
        try:
            adapter = parse_json(file.read_bytes())
        except (ValueError, OSError) as error:
            raise UserError(f"{file}: not valid JSON ({error}); import it again") from error
        adapters = {**(saved.get("adapters") or {}), each.get("modality", "image"): adapter}
        saved = {**saved, "adapters": adapters}
    return saved


def _onto(saved: Any, given: Any) -> Any:
    if not isinstance(saved, Mapping) or not isinstance(given, Mapping) or "kind" in given:
        return given
    return {**saved, **{key: _onto(saved.get(key), value) for key, value in given.items()}}


def _read(value: Any) -> Any:
    """A bare path as a mapping; ``init_from=PATH init_from.key=...`` comes as {"kind": PATH}."""
    if isinstance(value, (str, Path)):
        return {"path": value}
    if isinstance(value, Mapping) and "kind" in value and "path" not in value:
        rest = {k: v for k, v in value.items() if k != "kind"}
        return {"path": value["kind"], **rest}
    return value


def _write(value: InitFrom, dump: SerializerFunctionWrapHandler) -> Any:
    return str(value.path) if value == InitFrom(path=value.path) else dump(value)


# The annotation of a config field: to pydantic a path or a mapping, to a type checker an InitFrom.
if TYPE_CHECKING:
    InitFromField = InitFrom
else:
    InitFromField = Annotated[InitFrom, BeforeValidator(_read), WrapSerializer(_write)]
