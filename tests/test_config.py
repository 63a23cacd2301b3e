"""Configs: what cannot be built is named by its place in the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from generation_toys import VOCABULARY

from mm import config as configs
from mm.config import CannotBuild, Config, places_from, validate
from mm.errors import UserError
from mm.model.model import LmConfig
from mm.run import Run


class Part(Config):
    heads: int = 4

    def build(self, width: int) -> int:
        if width % self.heads:
            raise ValueError(f"width {width} is not a multiple of heads {self.heads}")
        return width // self.heads


class Inner(Config):
    side: int = 1

    def build(self) -> Any:
        return Part(heads=self.side * "x")  # type: ignore[arg-type]


class Whole(Config):
    first: Part = Part()
    parts: tuple[Part, ...] = ()
    named: dict[str, Part] = {}
    inner: Inner = Inner()

    def build(self, width: int) -> list[int]:
        return [part.build(width) for part in (*self.parts, *self.named.values())]


def test_what_cannot_be_built_is_named_by_its_keys() -> None:
    good = Part(heads=4)
    assert Whole(parts=(good,)).build(8) == [2]
    for whole, place in (
        (Whole(parts=(good, Part(heads=3))), "parts.1"),
        (Whole(named={"near": Part(heads=3)}), "named.near"),
    ):
        with pytest.raises(CannotBuild) as caught, places_from(whole, "my.yaml"):
            whole.build(8)
        assert str(caught.value) == f"my.yaml: {place}: width 8 is not a multiple of heads 3"
        assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
        with pytest.raises(CannotBuild, match=rf"^{place}: width"):
            whole.build(8)  # without a file: below the config that was asked


def test_a_config_that_is_made_while_building_is_named_by_its_kind() -> None:
    with pytest.raises(CannotBuild, match=r"^Inner: heads: Input should be a valid integer"):
        Inner().build()
    whole = Whole()
    with pytest.raises(CannotBuild) as caught, places_from(whole, "my.yaml"):
        Part(heads=3).build(8)
    assert str(caught.value).startswith("my.yaml: Part: width 8")


def test_a_run_names_the_key_of_its_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm.cli import main as cli
    from mm.trainer import loop

    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nmodel: {kind: lm, d_model: 32, backbone: {kind: stack, pattern: attention}}\n"
        "stages: [{data: {kind: packed, sources: [{path: x}]}, objective: next_token}]\n"
    )

    class BuildsAtOnce(loop.Trainer):
        def __init__(self, run: Any, callbacks: Any = ()):
            self.run = run

        def fit(self) -> dict[str, Any]:
            return self.run.model.build(VOCABULARY)

    monkeypatch.setattr(loop, "Trainer", BuildsAtOnce)
    assert cli.run(["train", str(file), "--model.backbone.mixers.attention.heads", "5"]) == 2
    place = "model.backbone.mixers.attention: d_model 32 is not a multiple of heads 5"
    assert capsys.readouterr().err.startswith(f"mm: {file}: {place}")


def test_sizes_end_somewhere() -> None:
    """Whatever a number counts: what no machine holds is told in one line, not by an allocator."""
    for d_model in (2**20 + 1, 2**31, 10**30):
        with pytest.raises(UserError, match=r"^x: d_model: "):
            validate(LmConfig, {"d_model": d_model}, "x")
    ffn = lambda hidden: {"kind": "swiglu", "hidden": hidden}
    stack = lambda hidden: {"kind": "stack", "depth": 1, "ffn": ffn(hidden)}
    for hidden in (2**48 + 1, 2**63, 10**30):
        with pytest.raises(UserError, match="hidden: larger than"):
            validate(LmConfig, {"d_model": 16, "backbone": stack(hidden)}, "x")
    for hidden in (2**40, 2**48):
        config = validate(LmConfig, {"d_model": 16, "backbone": stack(hidden)}, "x")
        with pytest.raises(UserError, match="too large for this machine"):
            config.build()


def test_thousands_of_faults_are_told_by_the_first_of_them(tmp_path: Path) -> None:
    """Found by `make fuzz`: a list of 3,000 wrong entries was a message of 3,000 lines."""
    file = tmp_path / "run.yaml"
    values = configs.read("configs/quickstart/hybrid.yaml")
    values["stages"][0]["tasks"][0] = {"kind": "recognition", "sources": list(range(3000))}
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as told:
        Run.load(file)
    lines = str(told.value).splitlines()
    assert len(lines) <= 21 and "sources.0" in str(told.value)
    assert re.search(r"and \d+ faults more", lines[-1])
