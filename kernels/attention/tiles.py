"""Tiles of the Triton attention, by card: a table, and what reads it."""

from __future__ import annotations

from mm.kernels import device

# Queries and keys of a tile, warps, stages: by card, direction and width, plain and where a fade or
# a soft-cap takes registers, too. The most that spills nothing: `tests/kernels/test_launches.py`.
Tile = tuple[int, int, int, int]
TILES: dict[int, dict[str, dict[int, tuple[Tile, Tile]]]] = {
    80: {
        "forward": {
            32: ((64, 64, 4, 2), (64, 64, 4, 2)),
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((64, 64, 4, 2), (64, 64, 4, 2)),
            256: ((64, 32, 8, 2), (64, 32, 8, 2)),
        },
        "queries": {
            32: ((128, 64, 8, 2), (128, 64, 8, 2)),
            64: ((128, 64, 8, 2), (128, 32, 8, 2)),
            128: ((128, 32, 8, 2), (64, 64, 8, 2)),
            256: ((64, 32, 8, 2), (64, 32, 8, 2)),
        },
        "keys": {
            32: ((64, 64, 4, 2), (32, 64, 8, 1)),
            64: ((32, 128, 8, 2), (32, 64, 8, 2)),
            128: ((64, 64, 8, 2), (32, 64, 8, 1)),
            256: ((32, 64, 8, 1), (64, 32, 8, 1)),
        },
    },
    86: {
        "forward": {
            32: ((64, 64, 4, 2), (64, 64, 4, 2)),
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((128, 64, 8, 2), (128, 32, 8, 2)),
            256: ((64, 32, 8, 2), (64, 32, 8, 2)),
        },
        "queries": {
            32: ((64, 64, 4, 2), (128, 64, 8, 2)),
            64: ((128, 64, 8, 2), (128, 32, 8, 2)),
            128: ((128, 32, 8, 2), (64, 64, 8, 2)),
            256: ((64, 32, 8, 1), (64, 32, 8, 1)),
        },
        "keys": {
            32: ((64, 64, 4, 2), (32, 64, 8, 1)),
            64: ((32, 128, 8, 2), (32, 64, 8, 2)),
            128: ((64, 64, 8, 2), (32, 64, 8, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
    },
    90: {
        "forward": {
            64: ((128, 128, 8, 3), (128, 128, 8, 3)),
            128: ((128, 64, 8, 3), (128, 64, 8, 3)),
            256: ((128, 32, 8, 2), (128, 32, 8, 2)),
        },
        "queries": {
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((128, 64, 8, 2), (128, 64, 8, 2)),
            256: ((128, 32, 8, 2), (128, 32, 8, 2)),
        },
        "keys": {
            64: ((64, 128, 8, 2), (32, 128, 8, 2)),
            128: ((32, 128, 8, 2), (32, 64, 8, 2)),
            256: ((32, 64, 8, 1), (32, 64, 8, 1)),
        },
    },
    100: {
        "forward": {
            64: ((128, 64, 8, 3), (128, 64, 8, 3)),
            128: ((128, 64, 8, 3), (128, 64, 8, 3)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2)),
        },
        "queries": {
            64: ((128, 64, 8, 3), (128, 64, 8, 3)),
            128: ((128, 64, 8, 2), (128, 64, 8, 2)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2)),
        },
        "keys": {
            32: ((64, 64, 8, 2), (64, 64, 8, 2)),
            64: ((32, 128, 8, 2), (32, 128, 8, 2)),
            128: ((32, 64, 8, 1), (64, 64, 8, 1)),
            256: ((32, 64, 8, 1), (32, 64, 8, 2)),
        },
    },
}
# Of float32 (three products of tf32 each), wider heads than 128 fit no card.
TILES_FLOAT32: dict[str, dict[int, tuple[Tile, Tile]]] = {
    "forward": {
        64: ((64, 32, 8, 1), (32, 64, 8, 1)),
        128: ((32, 16, 8, 1), (32, 16, 8, 1)),
    },
    "queries": {
        64: ((32, 32, 8, 1), (32, 32, 8, 1)),
        128: ((16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "keys": {
        64: ((32, 16, 4, 1), (32, 16, 4, 1)),
        128: ((16, 16, 8, 1), (16, 16, 8, 1)),
    },
}


def tile(width: int, item: int, way: str, rich: bool) -> Tile:
    """Queries and keys of a tile, warps, stages on the current card.

    Args:
        width: of the wider of keys and values, a power of two.
        item: bytes of an element.
        way: "forward", "queries" or "keys".
        rich: whether scores have a fade or a soft-cap.
    """
    tiles = TILES_FLOAT32 if item == 4 else TILES[device.card()]
    return tiles[way][min(each for each in tiles[way] if each >= width)][rich]
