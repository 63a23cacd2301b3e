"""`augment_image` by other libraries' transforms, and what it must leave as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from mm.data.transforms.augment_image import AugmentImageConfig, hide_square, part_of, recolour
from mm.errors import UserError
from mm.specs import Segment

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)


def segment(values: Any = PICTURE) -> Segment:
    """A picture as patches of 8 pixels; of None its length alone."""
    if values is not None:
        values = values.reshape(3, 8, 2, 8, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1)
    return Segment("image", ids=np.full(6, -1), values=values, grid=(3, 2))


def changed(seed: int = 0, **settings: Any) -> np.ndarray:
    (out,) = AugmentImageConfig(**settings).build()([segment()], np.random.default_rng(seed)) or ()
    assert out.values.dtype == np.uint8 and out.values.shape == (6, 192)
    return out.values.reshape(3, 2, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(24, 16, 3)


def torch_part(side: float, corner: Sequence[float]) -> np.ndarray:
    """The part of `PICTURE` that torch samples."""
    x = torch.from_numpy(PICTURE.astype(np.float64)).permute(2, 0, 1)[None]
    down, right = (2 * (c * (1 - side) + side / 2) - 1 for c in corner)
    theta = torch.tensor([[[side, 0, right], [0, side, down]]], dtype=torch.float64)
    grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    found = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return found[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("side", "corner"), [(1.0, (0.3, 0.9)), (0.6, (0.0, 1.0)), (0.8, (0.5, 0.25))]
)
def test_a_part_is_what_torch_samples(side: float, corner: tuple[float, float]) -> None:
    got = part_of(PICTURE, side, np.array(corner))
    np.testing.assert_allclose(got, torch_part(side, corner), atol=1e-9)


def test_a_zoom_shows_a_part_smaller_by_up_to_its_share() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rng.random()  # whether it is mirrored, and where it moves
        rng.integers(0, 1, 2)
        share, *corner = rng.random(3)
        want = torch_part(1 - 0.5 * share, corner).round()
        np.testing.assert_array_equal(changed(seed, mirror=0, shift=0, zoom=0.5), want)


def test_light_is_torchvisions_brightness_and_one_changes_nothing() -> None:
    x = torch.from_numpy(PICTURE / 255.0).permute(2, 0, 1)
    for factor in (0.6, 1.0, 1.4):
        want = TF.adjust_brightness(x, factor).permute(1, 2, 0).numpy() * 255
        np.testing.assert_allclose(recolour(PICTURE, factor, 1.0, 1.0), want, atol=1e-9)
    grey = recolour(PICTURE, 1.0, 1.0, 0.0)
    np.testing.assert_allclose(grey, np.broadcast_to(PICTURE.mean(-1, keepdims=True), grey.shape))
    flat = recolour(PICTURE, 1.0, 0.0, 1.0)
    np.testing.assert_allclose(flat, np.full(flat.shape, PICTURE.mean()))


def test_a_square_takes_the_mean_colour_and_nothing_else_moves() -> None:
    out = hide_square(PICTURE, 0.5, np.array([0.5, 0.5]))
    inside = np.zeros((24, 16), bool)
    inside[8:16, 4:12] = True
    np.testing.assert_array_equal(out[~inside], PICTURE[~inside])
    np.testing.assert_allclose(out[inside], np.tile(PICTURE.mean((0, 1)), (64, 1)))


def test_what_is_drawn_depends_on_no_pixel_and_old_settings_draw_as_before() -> None:
    settings = {"zoom": 0.3, "colour": 0.3, "erase": 0.3}
    ends = []
    for values in (PICTURE, None):
        rng = np.random.default_rng(5)
        AugmentImageConfig(**settings).build()([segment(values)], rng)
        ends.append(rng.random())
    assert ends[0] == ends[1]
    rng = np.random.default_rng(3)
    mirrored, (down, right) = rng.random() < 0.5, rng.integers(-4, 5, 2)
    want = PICTURE[:, ::-1] if mirrored else PICTURE
    rows, columns = np.clip(np.arange(24) + down, 0, 23), np.clip(np.arange(16) + right, 0, 15)
    np.testing.assert_array_equal(changed(3), want[rows][:, columns])
    assert not np.array_equal(changed(3, **settings), changed(4, **settings))


def test_colour_of_values_that_are_no_pixels_is_refused() -> None:
    values = segment()._replace(values=segment().values.astype(np.float32))
    with pytest.raises(UserError, match="colour of 'image' cannot be changed"):
        AugmentImageConfig(colour=0.1).build()([values], np.random.default_rng(0))
