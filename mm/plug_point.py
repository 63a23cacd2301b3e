"""Registry: one plug point, a lazy table from `kind` to the module that defines it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializeAsAny, WithJsonSchema

from mm.config import Config
from mm.errors import UserError, did_you_mean

C = TypeVar("C", bound=type[Config])


class Registry:
    """Names of one plug point.

    A registered class is a `Config` whose ``kind`` is its name and which owns ``build``.
    """

    every: dict[str, Registry] = {}

    def __init__(self, name: str, table: dict[str, str], renamed: dict[str, str] | None = None):
        self.name = name
        self.renamed = renamed or {}  # kinds that had another name: {"old": "new"}
        self._modules = dict(table)
        self._classes: dict[str, type[Config]] = {}
        Registry.every[name] = self

    def register(self, kind: str) -> Callable[[C], C]:
        """Class decorator: bind ``kind`` to a Config class; ValueError on a second of that name."""

        def bind(cls: C) -> C:
            old = self._classes.get(kind)
            if old is not None and old.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"{self.name} '{kind}' is registered twice: {old.__module__} and "
                    f"{cls.__module__}"
                )
            declared = cls.model_fields.get("kind")
            if declared is None or declared.default != kind:
                raise ValueError(
                    f'{cls.__qualname__} must declare  kind: Literal["{kind}"] = "{kind}"'
                )
            self._classes[kind] = cls
            self._modules.setdefault(kind, cls.__module__)
            return cls

        return bind

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._modules))

    def __contains__(self, kind: str) -> bool:
        return kind in self._modules

    def get(self, kind: str) -> type[Config]:
        """Return the Config class of ``kind``, importing its module.

        Raises UserError with a suggestion.
        """
        if kind not in self._modules:
            load_plugins()
        if kind not in self._modules and kind in self.renamed:
            raise UserError(f"{self.name} kind '{kind}' is called '{self.renamed[kind]}' now")
        if kind not in self._modules:
            raise UserError(
                f"unknown {self.name} kind '{kind[:80]}'{did_you_mean(kind, self._modules)}"
            )
        if kind not in self._classes:
            try:
                importlib.import_module(self._modules[kind])
            except ModuleNotFoundError as error:
                if error.name and error.name.split(".")[0] == "mm":
                    raise
                raise UserError(
                    f"{self.name} '{kind}' needs the package '{error.name}': "
                    f"pip install {error.name}"
                ) from error
        return self._classes[kind]

    def parse(self, value: Any) -> Config:
        """Turn ``{"kind": ..., ...}``, a bare kind string or a ready Config into a Config."""
        if isinstance(value, Config):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(f"a {self.name} needs 'kind', one of: {', '.join(self)}")
        try:
            cls = self.get(value["kind"])
        except UserError as error:  # pydantic collects ValueErrors with their path in the file
            raise ValueError(str(error)) from error
        return cls.model_validate(value)

    @property
    def field(self) -> Any:
        """The annotation of a config field that holds one entry of this registry."""
        schema = {
            "title": self.name,
            "$comment": self.name,  # pydantic drops the title of a mapping's values
            "anyOf": [{"type": "string", "enum": list(self)}, {"type": "object"}],
        }
        return Annotated[
            SerializeAsAny[Config], BeforeValidator(self.parse), WithJsonSchema(schema)
        ]

    def schema(self) -> dict[str, Any]:
        """JSON Schema of all kinds (imports every module; used by `mm config schema` only)."""
        return {"oneOf": [self.get(kind).model_json_schema() for kind in self]}


_plugins_loaded = False


def load_plugins() -> None:
    """Import what other packages announce in the entry-point group ``mm.plugins``, once."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in entry_points(group="mm.plugins"):
            point.load()
