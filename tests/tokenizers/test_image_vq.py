"""Image VQ.

The network, its objective with and without a critic, and what it learns from real scans of digits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_toys import HandEnv, batch, build, digits, run_step

from mm.errors import UserError
from mm.model.layer import init_weights
from mm.run import Run
from mm.specs import Encoded
from mm.tokenizers.image.critic import PatchCriticConfig
from mm.tokenizers.image.tokenizer import CHUNK, ImageVqTokenizerConfig, fit
from mm.tokenizers.image.vq import ImageVq, ImageVqConfig
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.quantizers.base import perplexity, usage_share

# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("quantizer", ["fsq", "vq", "lfq"])
def test_forward_gives_an_image_and_a_grid_of_ids(
    channels: int, colours: int, quantizer: str
) -> None:
    config = ImageVqConfig(
        size=16, channels=channels, down=(2, 2), widths=(8, 8), blocks=(1, 1), quantizer=quantizer
    )
    net = build(config)
    out = net(batch(torch.rand(3, colours, 16, 16)))
    assert out.intermediates["image"].shape == (3, channels, 16, 16)
    assert out.intermediates["ids"].shape == (3, 4, 4, 1) == (3, *config.grid, 1)
    assert out.aux["usage"].total.sum() == 48


def test_gray_and_its_three_equal_colours_are_the_same_picture() -> None:
    net = build(ImageVqConfig.smallest()).eval()
    gray = torch.rand(2, 1, 8, 8)
    one, three = net(batch(gray)), net(batch(gray.expand(-1, 3, -1, -1)))
    assert torch.equal(one.intermediates["ids"], three.intermediates["ids"])


def test_init_fills_nan_storage_built_on_meta() -> None:
    for config in (
        ImageVqConfig.smallest(),
        ImageVqConfig(quantizer="vq"),
        PatchCriticConfig.smallest(),
    ):
        with torch.device("meta"):
            net = config.build()
        net = net.to_empty(device="cpu")
        with torch.no_grad():
            for t in (*net.parameters(), *net.buffers()):
                t.fill_(float("nan") if t.is_floating_point() else -(10**6))
        init_weights(net)
        for name, t in (*net.named_parameters(), *net.named_buffers()):
            assert t.isfinite().all() and (t > -(10**6)).all(), name


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        build(ImageVqConfig.smallest())(batch(torch.rand(1, 3, 10, 10)))
    with pytest.raises(ValueError, match="no multiple of the total stride 8"):
        ImageVqConfig(size=20)
    with pytest.raises(ValueError, match="name the same levels"):
        ImageVqConfig(down=(4,))


def test_saved_network_is_a_tokenizer_and_comes_back(tmp_path: Path) -> None:
    net = build(ImageVqConfig(size=16, down=(4,), widths=(8,), blocks=(1,), quantizer="vq")).train()
    for step in range(3):
        out = net(batch(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(step))))
        net.after_step({k: v.detach() for k, v in out.aux.items()})
    net.eval()
    net.save_pretrained(tmp_path / "model", vocabulary=None, tokenizers={})
    image = torch.rand(4, 3, 16, 16)
    again = ImageVq.from_pretrained(tmp_path / "model")
    assert torch.equal(
        again(batch(image)).intermediates["image"], net(batch(image)).intermediates["image"]
    )
    tokenizer = load_tokenizer(tmp_path)
    pixels = [(x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for x in image]
    ids = net(batch(torch.stack([fit(p, 16) for p in pixels]))).intermediates["ids"]
    assert np.array_equal(tokenizer.encode(pixels)[2].ids, ids[2].flatten().numpy())
    assert tokenizer.spec.grid == (4, 4) and tokenizer.spec.vocab_size == 512
    with pytest.raises(UserError, match="no usable image_vq"):
        ImageVq.from_pretrained(tmp_path)


# ---- the tokenizer -------------------------------------------------------------------------------


def test_fit_resizes_the_short_side_and_keeps_the_middle() -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    assert fit(wide, 4).min() == 1.0
    assert fit(wide, 8).shape == (3, 8, 8) and fit(wide, 8)[:, :, 2:6].min() == 1.0
    assert fit(np.full((40, 3), 128, np.uint8), 8).shape == (3, 8, 8)


def test_transparent_pixels_are_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3] = 255
    image = fit(rgba, 8)
    assert image[:, :4].max() == 0 and image[:, 4:].min() == 1


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        3,
    ],
)
def test_what_is_no_image_is_refused(raw: Any) -> None:
    with pytest.raises(UserError, match="expected uint8"):
        ImageVqTokenizerConfig.smallest_tokenizer().encode([raw])


def test_many_images_equal_one_by_one_across_chunk_borders() -> None:
    tokenizer = ImageVqTokenizerConfig.smallest_tokenizer()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(2 * CHUNK + 5)]
    codes = tokenizer.encode(images)
    assert all(
        np.array_equal(c.ids, tokenizer.encode([x])[0].ids)
        for c, x in zip(codes, images, strict=True)
    )
    assert all(
        np.array_equal(a, tokenizer.decode([c])[0])
        for a, c in zip(tokenizer.decode(codes), codes, strict=True)
    )


def test_decode_fills_missing_ids_and_drops_surplus_ones() -> None:
    tokenizer = ImageVqTokenizerConfig.smallest_tokenizer()
    full, short, long = tokenizer.decode(
        [
            Encoded(np.array([5, 3, 0, 0])),
            Encoded(np.array([5, 3])),
            Encoded(np.array([5, 3, 0, 0, 7])),
        ]
    )
    assert np.array_equal(full, short) and np.array_equal(full, long) and full.shape == (8, 8, 3)


# ---- what it learns ------------------------------------------------------------------------------


def learn(
    run: Run, steps: int, quantizer: Any = None, **weights: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Train the run's network by hand.

    Held-out PSNR in dB, and usage and perplexity of each book.
    """
    train, held_out = digits()
    stage = run.stages[0]
    config = (
        run.model if quantizer is None else run.model.model_copy(update={"quantizer": quantizer})
    )
    net = build(config)
    change = {"aux_weights": weights} if weights else {}
    objective = stage.objective.model_copy(update=change).build()
    env = HandEnv({"model": net})
    optimizer = stage.optimizer.build(net)
    schedule = stage.schedule
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.optimizer.lr * schedule(step, steps)
        picked = torch.randint(
            0, len(train), (stage.data.batch_size,), generator=torch.Generator().manual_seed(step)
        )
        run_step(objective, [batch(train[picked])], env, {"model": optimizer})
    net.eval()
    with torch.no_grad():
        out = net(batch(held_out))
    mse = (out.intermediates["image"].clamp(0, 1) - held_out).square().mean((1, 2, 3))
    h = out.aux["usage"].total
    return float(-10 * mse.log10().mean()), usage_share(h), perplexity(h)


@pytest.fixture(scope="module")
def shipped() -> Run:
    return Run.load("configs/tokenizer/image.yaml")


def test_shipped_yaml_learns_digits_in_a_few_seconds(shipped: Run) -> None:
    """200 of its 1,000 steps; PSNR of the mean image is about 11 dB."""
    psnr, share, _ = learn(shipped, 200)
    assert psnr > 20.5
    assert share.min() >= 0.9


@pytest.mark.parametrize(
    ("quantizer", "weights"),
    [
        pytest.param({"kind": "vq", "codebook_size": 64, "d": 8}, {}, marks=pytest.mark.slow),
        ({"kind": "lfq", "bits": 6}, {"commitment": 0.01, "entropy": 0.01}),
    ],
    ids=lambda value: value.get("kind"),
)
def test_other_quantizers_learn_in_the_same_network(
    shipped: Run, quantizer: dict[str, Any], weights: dict[str, float]
) -> None:
    from mm.registry import QUANTIZERS

    psnr, share, spread = learn(shipped, 120, QUANTIZERS.parse(quantizer), **weights)
    assert psnr > 19
    assert share.min() >= 0.75 and spread.min() > 20


@pytest.mark.slow
def test_shipped_yaml_reaches_its_bar(shipped: Run) -> None:
    """The quickstart's bar.

    Held-out PSNR of at least 24 dB with at least 90 % of the codes in use.
    """
    psnr, share, _ = learn(shipped, shipped.stages[0].budget.steps)
    assert psnr >= 25
    assert share.min() >= 0.9
    assert math.prod(shipped.model.grid) == 16
