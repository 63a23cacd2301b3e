"""SEANet in the checkpoints of EnCodec and Mimi, whose layers stand in one numbered list a side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mm.interchange.codecs.family import MOST, PADDINGS, flag, strides_of, whole_number
from mm.interchange.family import Settings
from mm.interchange.parts import Entry
from mm.tokenizers.audio.seanet import SeanetFrontEndConfig

Convolution = Callable[[str, str], Iterator[Entry]]


def front_end(c: Settings) -> dict[str, Any]:
    """Values of our `SeanetFrontEndConfig`, without LSTM. Raises UserError naming a key."""
    c.only("audio_channels", 1)
    c.only("trim_right_ratio", 1.0)
    padding = next((ours for name, ours in PADDINGS.items() if name == c["pad_mode"]), None)
    if padding is None:
        raise c.refuse("pad_mode", f"has no equal here; {', '.join(PADDINGS)} have")
    growth = whole_number(c, "dilation_growth_rate")
    units = whole_number(c, "num_residual_layers", most=16)
    return {
        "kind": "seanet",
        "strides": tuple(reversed(strides_of(c, "upsampling_ratios"))),
        "width": whole_number(c, "num_filters"),
        "residual_dilations": tuple(min(growth**j, MOST) for j in range(units)),
        "kernel": whole_number(c, "kernel_size", most=MOST),
        "last_kernel": whole_number(c, "last_kernel_size", most=MOST),
        "residual_kernel": whole_number(c, "residual_kernel_size", most=MOST),
        "compress": whole_number(c, "compress"),
        "shortcut": flag(c, "use_conv_shortcut"),
        "causal": flag(c, "use_causal_conv"),
        "padding": padding,
        "end": "layers",
    }


def entries(config: SeanetFrontEndConfig, prefix: str, convolution: Convolution) -> Iterator[Entry]:
    """Lines of both sides; ``convolution(ours, theirs)`` gives those of one layer."""
    levels, units = range(len(config.strides)), range(len(config.residual_dilations))
    lstm = config.lstm_layers > 0

    def unit(ours: str, theirs: str) -> Iterator[Entry]:
        yield from convolution(f"{ours}.narrow", f"{theirs}.block.1.conv")
        yield from convolution(f"{ours}.widen", f"{theirs}.block.3.conv")
        if config.shortcut:
            yield from convolution(f"{ours}.shortcut", f"{theirs}.shortcut.conv")

    at = lambda side, i: f"{side}.layers.{i}"
    yield from convolution(f"{prefix}first", f"{at('encoder', 0)}.conv")
    i = 1
    for level in levels:
        for j in units:
            yield from unit(f"{prefix}encoder_units.{level}.{j}", at("encoder", i + j))
        i += len(units) + 1  # an activation stands between
        yield from convolution(f"{prefix}downs.{level}", f"{at('encoder', i)}.conv")
        i += 1
    if lstm:
        yield from lstm_entries(config, f"{prefix}encoder_lstm", at("encoder", i))
    yield from convolution(f"{prefix}to_code", f"{at('encoder', i + lstm + 1)}.conv")

    yield from convolution(f"{prefix}from_code", f"{at('decoder', 0)}.conv")
    if lstm:
        yield from lstm_entries(config, f"{prefix}decoder_lstm", at("decoder", 1))
    i = 1 + lstm
    for level in levels:
        yield from convolution(f"{prefix}ups.{level}", f"{at('decoder', i + 1)}.conv")
        for j in units:
            yield from unit(f"{prefix}decoder_units.{level}.{j}", at("decoder", i + 2 + j))
        i += 2 + len(units)
    yield from convolution(f"{prefix}last", f"{at('decoder', i + 1)}.conv")


def lstm_entries(config: SeanetFrontEndConfig, ours: str, theirs: str) -> Iterator[Entry]:
    """Lines of the recurrent layers."""
    for layer in range(config.lstm_layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            yield Entry(f"{ours}.cell.{name}_l{layer}", (f"{theirs}.lstm.{name}_l{layer}",))
