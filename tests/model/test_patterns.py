"""Patterns of a stack: what words mean, and what is said of wrong ones."""

from __future__ import annotations

import pytest

from mm.config import validate
from mm.errors import UserError
from mm.model.backbones.pattern import parse, tile
from mm.model.backbones.stack import StackConfig
from mm.model.mixers.attention.attention import Attention
from mm.model.mixers.ssm.rg_lru import RGLRU

# ---- patterns ----


@pytest.mark.parametrize(
    "pattern,words",
    [
        ("attention", ["attention"]),
        ("2*rg_lru local_attention", ["rg_lru", "rg_lru", "local_attention"]),
        ("2*(a b) c", ["a", "b", "a", "b", "c"]),
        ("2*(a 2*(b c)) d", ["a", "b", "c", "b", "c", "a", "b", "c", "b", "c", "d"]),
        (" 1 * a(b)3* c ", ["a", "b", "c", "c", "c"]),
    ],
)
def test_patterns(pattern: str, words: list[str]) -> None:
    assert parse(pattern) == words


@pytest.mark.parametrize(
    "pattern,fault",
    [
        ("", "names no mixer"),
        ("2*", "repeat count"),
        ("2 a", "expected a word"),
        ("(a", "not closed"),
        ("a)", "nothing to close"),
        ("0*a", "repeat count"),
        ("a, b", "expected a word"),
        ("2*3*a", "repeat count"),
        ("00*a", "repeat count"),
        ("4097*a", "more than 4096 layers"),
        (f"{10**9}*a", "more than 4096 layers"),
        ("9" * 5_000 + "*a", "more than 4096 layers"),  # more digits than int() takes
        ("2*(a 2*)", "nothing to close"),
        ("()", "names no mixer"),
    ],
)
def test_wrong_patterns_point_at_the_fault(pattern: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        parse(pattern)


def test_a_pattern_is_repeated_to_the_depth() -> None:
    assert tile(["a", "a", "b"], 7) == ["a", "a", "b", "a", "a", "b", "a"]
    assert tile(["a", "b"], None) == ["a", "b"]
    with pytest.raises(UserError, match="depth is 1"):
        tile(["a", "b"], 1)


def test_words_are_entries_presets_or_kinds() -> None:
    config = StackConfig(
        pattern="rg_lru local_attention attention mine",
        mixers={
            "local_attention": {"heads": 2},
            "attention": {"kv_heads": 2},
            "mine": {"kind": "attention", "heads": 8, "window": 5},
        },
    )
    stack = config.build(32)
    mixers = [layer.mixer for layer in stack.layers]
    assert isinstance(mixers[0], RGLRU) and all(isinstance(m, Attention) for m in mixers[1:])
    assert [(m.heads, m.kv_heads, m.window) for m in mixers[1:]] == [
        (2, 2, 128),
        (4, 2, None),
        (8, 8, 5),
    ]
    assert validate(StackConfig, config.to_dict(), "again") == config, (
        "a resolved config means the same"
    )


@pytest.mark.parametrize(
    "values,message",
    [
        ({"pattern": "atention"}, "did you mean 'attention'"),
        ({"pattern": "local_atention"}, "did you mean 'local_attention'"),
        ({"mixers": {"nothing_like_it": {"heads": 2}}}, "no mixer preset or kind"),
        ({"mixers": {"attention": {"kv_head": 2}}}, "did you mean 'kv_heads'"),
        ({"depht": 3}, "did you mean 'depth'"),
    ],
)
def test_wrong_words_suggest_the_right_one(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(StackConfig, values, "test.yaml")


@pytest.mark.parametrize(
    "mixer,message",
    [
        ({"kind": "attention", "heads": 3}, "d_model 16 is not a multiple of heads 3"),
        ({"kind": "attention", "heads": 4, "kv_heads": 3}, "not a multiple of kv_heads"),
        ({"kind": "attention", "heads": 2, "head_dim": 5}, "rotates pairs"),
        ({"kind": "rg_lru", "width": 10}, "not a multiple of heads"),
    ],
)
def test_sizes_that_do_not_fit_are_named(mixer: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackConfig(pattern="m", mixers={"m": mixer}).build(16)
