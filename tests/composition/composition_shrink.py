"""The smallest case that breaks the law."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from composition_checks import Fault, first_fault
from composition_configs import Case, Refused


def smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less, boldest first."""

    def changed(f: Callable[[Case], None]) -> Case:
        other = copy.deepcopy(case)
        f(other)
        return other

    documents = case["documents"]
    for i in range(len(documents)):
        if len(documents) > 1:
            yield changed(lambda c, i=i: c["documents"].pop(i))
    if case.get("path"):
        yield changed(lambda c: c.pop("path"))
        for i in range(len(case["path"])):
            if len(case["path"]) > 1:
                yield changed(lambda c, i=i: c["path"].pop(i))
    if case["mask"] != "causal":
        yield changed(lambda c: (c.update(mask="causal"), c["model"].pop("mask", None)))
    yield from (_with(case, "model", m) for m in _smaller_values(case["model"]))
    for i, d in enumerate(documents):
        for name in [k for k in d if k != "length"]:
            yield changed(lambda c, i=i, name=name: c["documents"][i].pop(name))
        if len(d.get("blocks") or []) > 1:
            for j in range(len(d["blocks"])):
                yield changed(lambda c, i=i, j=j: c["documents"][i]["blocks"].pop(j))
        for length in sorted({1, d["length"] // 2, d["length"] - 1}):
            if 0 < length < d["length"]:
                cut = _cut(d, length)
                yield changed(lambda c, i=i, cut=cut: c["documents"].__setitem__(i, cut))
        if d.get("item"):
            at, n, room = d["item"]
            for item in ([at, n, n], [at, 1, 1 + room - n], [at, n, room - 1]):
                if item != d["item"] and item[1] <= item[2]:
                    yield changed(lambda c, i=i, item=item: c["documents"][i].update(item=item))


def _with(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**values, key: value}


def _cut(document: dict[str, Any], length: int) -> dict[str, Any]:
    d = {**copy.deepcopy(document), "length": length}
    if d.get("item") and d["item"][0] + d["item"][1] > length:
        d.pop("item")
    if d.get("grid") and d["grid"][0] + d["grid"][1] * d["grid"][2] > length:
        d.pop("grid")
    if d.get("blocks"):
        d["blocks"] = [[a, min(b, length)] for a, b in d["blocks"] if a < length]
    return d


def _smaller_values(value: Any) -> Iterator[Any]:
    """Values with one layer, wrapper or setting less."""
    if isinstance(value, dict):
        if "pattern" in value:
            words = value["pattern"].split()
            for word in words:
                if len(words) > 1:
                    left = [w for w in words if w != word]
                    less = _with(value, "pattern", " ".join(left))
                    for name in ("mixers", "blocks"):
                        if word in (value.get(name) or {}):
                            less[name] = {k: v for k, v in value[name].items() if k != word}
                    yield less
        for name, part in value.items():
            if name in ("kind", "pattern", "d_model", "mixers"):
                continue
            # Unwrap: a part in place of the whole.
            if isinstance(part, dict) and "kind" in part and "kind" in value:
                yield part
            if isinstance(part, list):
                yield from (p for p in part if isinstance(p, dict) and "kind" in p)
            yield {k: v for k, v in value.items() if k != name}
            if part is not None and name in ("ffn", "channel"):
                yield _with(value, name, None)
        for name, part in value.items():
            if isinstance(part, dict | list):
                yield from (_with(value, name, less) for less in _smaller_values(part))
    elif isinstance(value, list):
        if len(value) > 1:
            yield from ([*value[:i], *value[i + 1 :]] for i in range(len(value)))
        for i, part in enumerate(value):
            yield from ([*value[:i], less, *value[i + 1 :]] for less in _smaller_values(part))


def shrunk(case: Case, fault: Fault, seconds: float = 30.0) -> tuple[Case, Fault]:
    """The smallest case found that breaks the same part of the law."""
    until = time.monotonic() + seconds

    def breaks(other: Case) -> Fault | None:
        try:
            found = first_fault(other)
        except Refused:
            return None
        except AssertionError:
            return None
        return found if found is not None and found.check == fault.check else None

    again = True
    while again:
        again = False
        for other in smaller(case):
            if time.monotonic() > until:
                return case, fault
            if (found := breaks(other)) is not None:
                case, fault, again = other, found, True
                break
    return case, fault


def report(case: Case, fault: Fault) -> str:
    """The smallest failing composition as YAML to paste, with what differed."""
    small, found = shrunk(case, fault)
    written = json.loads(json.dumps(small))  # no two places share a value: YAML would name it
    text = yaml.safe_dump(written, sort_keys=False, default_flow_style=None, width=100)
    return (
        f"seed {case['seed']}: {fault.check}: {fault.message}\n"
        f"smallest: {found.check}: {found.message}\n{text}"
    )
