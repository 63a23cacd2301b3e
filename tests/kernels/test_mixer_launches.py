"""What mixers launch fits the cards: every Triton launch of a training step in bf16 autocast.

No spill, no launch larger than the card's shared memory, matrix instructions where there are
products: for sm_80, sm_90 and sm_100, and at one width for cards with 99 KB, built without a GPU.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from laws import ROOT
from mixer_launches import calls_of, launches_of
from test_no_silent_host_models import backbones
from triton_oracle import built

from mm import config as yaml_config
from mm.kernels import device
from mm.model.backbones.stack import presets


@pytest.mark.slow
@pytest.mark.timeout(900)  # tens of kernels for up to five cards, on a cold cache
@pytest.mark.parametrize("d_model", [1024, 2048, 4096])
@pytest.mark.parametrize("name", backbones())
def test_launches_of_a_backbone_fit(name: str, d_model: int) -> None:
    calls = calls_of(yaml_config.read(ROOT / "configs" / "backbone" / f"{name}.yaml"), d_model)
    assert {op.name() for op, _ in calls} > {"mm::rms_norm_triton", "mm::rms_norm_triton_backward"}
    for card in device.CARDS if d_model == 2048 else (80, 90, 100):
        for launch in launches_of(calls, card):
            built(launch).check()


@pytest.mark.slow
@pytest.mark.parametrize("word", presets())
@pytest.mark.parametrize(
    "d_model,card", [(2048, 90), (2048, 80), (2048, 100), (1024, 90), (4096, 90)]
)  # the outer loop: the card that most have comes first
def test_launches_of_a_preset_fit(d_model: int, card: int, word: str) -> None:
    """Of every named mixer."""
    backbone = {"kind": "stack", "pattern": word, "ffn": {"kind": "swiglu", "hidden": 32}}
    settings = {"mask": "full"} if "plstm" in word else {}
    for launch in launches_of(calls_of(backbone, d_model, **settings), card):
        built(launch).check()
