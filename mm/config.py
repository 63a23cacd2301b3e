"""Typed configuration.

Frozen pydantic models, YAML with a one-parent `base:`, and `a.b=c` overrides.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mm.errors import UserError, did_you_mean
from mm.reading import parse_json, parse_yaml

T = TypeVar("T", bound="Config")
SHIPPED = Path(__file__).parent / "configs"
MOST_FAULTS = 20  # that one message names
LARGEST = 2**48  # of any whole number of a config: 281 TB, where it counts bytes


class CannotBuild(UserError, ValueError):
    """A config cannot be built; says where it stands below ``root``, and why."""

    def __init__(self, config: Config, reason: str):
        super().__init__(reason)
        self.config, self.root, self.origin, self.reason = config, config, "", reason

    def __str__(self) -> str:
        place = ".".join(_place_of(self.config, self.root) or ())
        place = place or str(getattr(self.config, "kind", type(self.config).__name__))
        return f"{self.origin}{place}: {self.reason}"


def _place_of(config: Config, within: Any) -> tuple[str, ...] | None:
    """Keys that lead to a config, or None where it is not found."""
    if within is config:
        return ()
    if isinstance(within, Config):
        parts: Iterable[tuple[Any, Any]] = (
            (k, getattr(within, k)) for k in type(within).model_fields
        )
    elif isinstance(within, Mapping):
        parts = within.items()
    elif isinstance(within, (list, tuple)):
        parts = enumerate(within)
    else:
        return None
    found = ((str(key), _place_of(config, value)) for key, value in parts)
    return next(((key, *rest) for key, rest in found if rest is not None), None)


@contextmanager
def places_from(root: Config, origin: str) -> Iterator[None]:
    """Inside, what cannot be built is named by its keys below ``root``, of the file ``origin``."""
    try:
        yield
    except CannotBuild as error:
        error.root, error.origin = root, f"{origin}: "
        raise


def _placing(build: Callable[..., Any]) -> Callable[..., Any]:
    """A `build` whose ValueErrors, which are the input's, become `CannotBuild`."""

    @functools.wraps(build)
    def placed(self: Config, *args: Any, **kw: Any) -> Any:
        try:
            return build(self, *args, **kw)
        except CannotBuild as error:
            error.root = self  # the outermost that was asked
            raise
        except ValueError as error:
            reason = "; ".join(faults(error)) if isinstance(error, ValidationError) else str(error)
            raise CannotBuild(self, " ".join(reason.split())) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_too_large(error):
                raise
            raise CannotBuild(self, "too large for this machine; make its sizes smaller") from error

    return placed


def _is_too_large(error: Exception) -> bool:
    """Whether torch or numpy said that what was asked for does not fit, or no number holds it."""
    words = ("allocate memory", "out of memory", "Storage size calculation overflowed",
             "numel: integer multiplication overflow")  # fmt: skip
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def faults(error: ValidationError) -> list[str]:
    """One line a fault of pydantic's: keys, and why; of many faults the first `MOST_FAULTS`."""
    lines = []
    found = error.errors()
    # a tuple whose parts are wrong is too short, says pydantic, for want of valid ones
    causes = [f for f in found if "after validation" not in f["msg"]]
    for fault in causes or found:
        where = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{where + ': ' if where else ''}{message}")
    lines = list(dict.fromkeys(lines))
    more = len(lines) - MOST_FAULTS
    return lines if more <= 0 else [*lines[:MOST_FAULTS], f"and {more} faults more"]


class Config(BaseModel):
    """Base of every config.

    Frozen; an unknown key is an error that suggests the known one. Subclasses own `build`, whose
    ValueErrors reach the user as one line that says where in the YAML the config stands.
    """

    # Keys that had another name: {"old": "new"}. They are refused with the new name.
    renamed: ClassVar[Mapping[str, str]] = {}
    small: ClassVar[Mapping[str, Any]] = {}  # what `smallest` sets; all else is default

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kw: Any) -> None:
        super().__pydantic_init_subclass__(**kw)
        if "build" in cls.__dict__:
            cls.build = _placing(cls.__dict__["build"])

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key in cls.renamed:
                    raise ValueError(f"key '{key}' is called '{cls.renamed[key]}' now")
                if key not in cls.model_fields:
                    raise ValueError(
                        f"unknown key '{key}'{did_you_mean(str(key), cls.model_fields)}"
                    )
        return value

    @model_validator(mode="after")
    def _numbers_end(self) -> Self:
        for name, value in self:
            if type(value) is not int or abs(value) <= LARGEST:
                continue
            bounds = type(self).model_fields[name].metadata
            if not any(hasattr(b, "le") or hasattr(b, "lt") for b in bounds):  # it has its own
                raise ValueError(f"{name}: larger than {LARGEST}")
        return self

    def build(self, *args: Any, **kw: Any) -> Any:
        """Make the thing that this config describes."""
        raise NotImplementedError(f"{type(self).__qualname__} does not build anything")

    @classmethod
    def smallest(cls: type[T]) -> T:
        """The smallest useful instance: the laws of tests/test_contract*.py run over it."""
        return cls(**cls.small)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, defaults included, with every `kind`."""
        return self.model_dump(mode="json")


def find(path: str | Path, beside: Path | None = None) -> Path:
    """Locate a YAML: as given, beside the file that names it, or among the shipped configs.

    The suffix is optional.
    """
    given = Path(path)
    shipped = Path(*given.parts[1:]) if given.parts and given.parts[0] == "configs" else given
    for candidate in [given, *([beside / given] if beside else []), SHIPPED / shipped]:
        for name in (candidate, candidate.with_name(candidate.name + ".yaml")):
            if name.is_file():
                return name
    everything = [str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.yaml")]
    raise UserError(f"no config '{path}'{did_you_mean(str(shipped.with_suffix('')), everything)}")


def trainable() -> list[str]:
    """Shipped configs that `mm train` takes: those with stages, their own or of their base."""
    found = []
    for file in sorted(SHIPPED.rglob("*.yaml")):
        if "stages" in read(file):
            found.append(str(file.relative_to(SHIPPED).with_suffix("")))
    return found


def read(
    path: str | Path, beside: Path | None = None, seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Read a YAML and merge it over its `base:`; a null removes a key of the base.

    Raises UserError on bad YAML or a cycle.
    """
    file = find(path, beside).resolve()
    if file in seen:
        raise UserError(
            f"{file.name}: 'base' goes in a circle: {' -> '.join(p.name for p in (*seen, file))}"
        )
    try:
        values = parse_yaml(file.read_bytes()) or {}
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level must be 'key: value' pairs")
    base = values.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: base: must be the path of one YAML")
    return merge(read(base, file.parent, (*seen, file)), values) if base else values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; lists and a mapping of another `kind` replace, null removes."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        same_kind = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        )
        if value is None and key in out:
            del out[key]
        else:
            out[key] = merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return out


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` (list places by number: `stages.0.budget.steps=10`); the value is YAML."""
    for text in assignments:
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise UserError(f"override '{text}' has half a character, which no text can hold")
        path, equals, raw = text.partition("=")
        if not equals or not path:
            raise UserError(f"override '{text}' is not of the form key.sub=value")
        node: Any = values
        *parents, last = path.lstrip("-").split(".")
        for i, word in enumerate([*parents, last]):
            key: Any = word
            if isinstance(node, list):
                if not word.isdigit() or int(word) >= len(node):
                    raise UserError(
                        f"override '{text}': '{word}' is not a place of a list of {len(node)}"
                    )
                key = int(word)
            elif not isinstance(node, dict):
                raise UserError(
                    f"override '{text}': '{'.'.join(parents[:i])}' holds a plain value, no '{word}'"
                )
            if i == len(parents):
                try:
                    node[key] = parse_yaml(raw)
                except ValueError as error:
                    raise UserError(f"override '{text}': not valid YAML: {error}") from error
                break
            below = node.get(key, {}) if isinstance(node, dict) else node[key]
            # `mixer: attention` is short for its kind
            node[key] = {"kind": below} if isinstance(below, str) else below
            node = node[key]
    return values


def validate(cls: type[T], values: Mapping[str, Any], origin: str) -> T:
    """Build ``cls`` from plain values. Raises UserError: one line a fault (origin, path, why)."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{origin}: {line}" for line in faults(error))) from error


def load(path: str | Path, cls: type[T], overrides: Iterable[str] = ()) -> T:
    """Read, merge, override and validate one YAML file. Raises UserError."""
    return validate(cls, override(read(path), overrides), str(path))


def import_modules(values: Mapping[str, Any], origin: str, trust_code: bool) -> None:
    """Import the modules that `imports:` names, so that their kinds are known.

    Raises UserError: no list of names, a module that is missing, or one that is not imported yet
    and whose folder is not trusted with code.
    """
    names = values.get("imports") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{origin}: imports: must be a list of names of Python modules")
    for name in names:
        if not all(word.isidentifier() for word in name.split(".")):
            raise UserError(f"{origin}: imports: '{name[:80]}' is no name of a Python module")
        if name in sys.modules:
            continue
        if not trust_code:
            raise UserError(
                f"{origin}: imports: '{name}' is code that this folder asks to run; if you trust "
                "it: --trust-code (in Python: trust_code=True)"
            )
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{origin}: imports: no module '{error.name}'; install it, or name its folder: "
                "PYTHONPATH=FOLDER mm ..."
            ) from error


def dump(config: Config) -> str:
    """The resolved config as YAML, in declaration order."""
    return yaml.safe_dump(parse_json(config.model_dump_json()), sort_keys=False, allow_unicode=True)
