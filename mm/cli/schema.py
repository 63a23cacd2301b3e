"""JSON Schema of a Run with all registered kinds, and resolving any YAML of the project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import create_model
from pydantic.json_schema import GenerateJsonSchema

from mm import config
from mm.config import Config
from mm.errors import UserError
from mm.plug_point import Registry, load_plugins
from mm.registry import TokenizerField
from mm.run import Run


class _Schema(GenerateJsonSchema):
    """Accept anything for fields that JSON cannot express (an arbitrary object).

    The default fails the whole schema.
    """

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


def run_schema() -> dict[str, Any]:
    """Return the JSON Schema of a Run YAML.

    Every plug point is one entry of ``$defs`` (``$defs/mixer`` and so on): ``oneOf`` a bare kind
    and the configs of all
    registered kinds, whose definitions stand beside it as ``mixer.attention``. A file with
    ``base:`` may leave keys out.
    """
    load_plugins()
    definitions: dict[str, Any] = {}
    run = definition(Run, "Run", definitions)
    for registry in Registry.every.values():
        branches: list[dict[str, Any]] = [{"type": "string", "enum": list(registry)}]
        for kind in registry:
            name = f"{registry.name}.{kind}"
            body = definition(registry.get(kind), name, definitions)
            body["properties"]["kind"] = {"const": kind, "type": "string"}
            body["required"] = ["kind", *(key for key in body.get("required", ()) if key != "kind")]
            definitions[name] = body
            branches.append({"$ref": f"#/$defs/{name}"})
        definitions[registry.name] = {"title": registry.name, "oneOf": branches}
    run["properties"]["base"] = {
        "type": "string",
        "description": "another YAML that this one is merged over",
    }
    definitions["Run"] = run
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mm Run",
        "anyOf": [{"$ref": "#/$defs/Run"}, {"type": "object", "required": ["base"]}],
        "$defs": definitions,
    }


def definition(cls: type[Config], name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of one Config; its own nested models join ``definitions`` under ``<name>.<model>``."""
    body = cls.model_json_schema(schema_generator=_Schema)
    nested = body.pop("$defs", {})
    renamed = {old: f"{name}.{old}" for old in nested}
    for old, schema in nested.items():
        definitions[renamed[old]] = _link(schema, renamed)
    return _link(body, renamed)


def _link(node: Any, renamed: dict[str, str]) -> Any:
    """Point fields of a plug point at its entry of ``$defs``, nested models at their new names."""
    if isinstance(node, list):
        return [_link(item, renamed) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("$comment") in Registry.every and "anyOf" in node:
        known = ("title", "$comment", "anyOf")
        rest = {key: value for key, value in node.items() if key not in known}
        return {"$ref": f"#/$defs/{node['$comment']}", **rest}
    reference = str(node.get("$ref", ""))
    out = {key: _link(value, renamed) for key, value in node.items()}
    if reference.startswith("#/$defs/") and (old := reference.removeprefix("#/$defs/")) in renamed:
        out["$ref"] = f"#/$defs/{renamed[old]}"
    return out


def resolve(path: str, assignments: Sequence[str] = (), *, trust_code: bool = True) -> Config:
    """Read any YAML of the project: a Run, or a file with `tokenizer:`. Raises UserError.

    Args:
        trust_code: False for a file that is looked at before it is trusted. What an assignment
            names in `imports=` was typed, and is imported.
    """
    trust_code = trust_code or any(a.lstrip("-").startswith("imports=") for a in assignments)
    values = config.override(config.read(path), assignments)
    if "tokenizer" in values and "stages" not in values:
        config.import_modules(values, path, trust_code)
        model = create_model(
            "TokenizerFile",
            __base__=Config,
            imports=(tuple[str, ...], ()),
            tokenizer=(TokenizerField, ...),
        )
        return config.validate(model, values, path)
    if "stages" not in values and "kind" in values:
        fitting = [r for r in Registry.every.values() if values["kind"] in r]
        if not fitting:
            raise UserError(
                f"{path}: kind '{values['kind']}' is of no plug point; see: mm config schema"
            )
        # Two plug points may have a member of one name: the file lies in the folder of its own.
        fitting.sort(key=lambda r: r.name != Path(path).resolve().parent.name)
        return config.validate(fitting[0].get(values["kind"]), values, path)
    return Run.load(path, assignments, trust_code=trust_code)
