"""The objective of image tokenizers: micro-batches, losses, warm-up, the critic."""

from __future__ import annotations

import pytest
import torch
from image_toys import HandEnv, batch, build, digits, run_step
from torch import Tensor, nn

from mm.objectives.vq import VqObjectiveConfig
from mm.tokenizers.image.critic import PatchCriticConfig
from mm.tokenizers.image.vq import ImageVqConfig


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
@pytest.mark.parametrize("adversarial", [False, True])
def test_micro_batches_change_nothing(quantizer: str, adversarial: bool) -> None:
    config = ImageVqConfig(size=8, down=(4,), widths=(8,), blocks=(1,), quantizer=quantizer)
    critic = (
        {"critic": {"kind": "patch_critic", "width": 8, "depth": 1}, "start_step": 0}
        if adversarial
        else None
    )
    objective = VqObjectiveConfig(l1=0.3, adversarial=critic).build()
    image = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for sizes in ([12], [4, 4, 4], [1, 11]):
        nets = {"model": build(config)} | (
            {"critic": build(PatchCriticConfig(width=8, depth=1))} if adversarial else {}
        )
        means = run_step(objective, [batch(x) for x in image.split(sizes)], HandEnv(nets))
        results.append((means, {name: gradients(net) for name, net in nets.items()}))
    for means, grads in results[1:]:
        assert means == pytest.approx(results[0][0], rel=1e-4)
        for name in grads:
            assert grads[name].keys() == results[0][1][name].keys() and grads[name]
            for key, grad in grads[name].items():
                torch.testing.assert_close(grad, results[0][1][name][key], rtol=1e-3, atol=1e-6)


def test_losses_are_what_they_say() -> None:
    net = build(ImageVqConfig(size=8, down=(4,), widths=(8,), blocks=(1,), quantizer="vq"))
    image = torch.rand(5, 3, 8, 8)
    out = net(batch(image))
    means = run_step(VqObjectiveConfig(l1=0.25).build(), [batch(image)], HandEnv({"model": net}))
    error = (out.intermediates["image"] - image).detach()
    assert means["reconstruction"] == pytest.approx(
        float(0.75 * error.square().mean() + 0.25 * error.abs().mean()), rel=1e-5
    )
    assert means["commitment"] == pytest.approx(
        float(out.aux["commitment"].mean().detach()), rel=1e-5
    )


def test_the_zero_item_of_a_rank_without_images_counts_nowhere() -> None:
    objective = VqObjectiveConfig().build()
    image = torch.rand(3, 3, 8, 8)
    padded = torch.cat([image, torch.zeros(1, 3, 8, 8)])
    one, two = (
        build(ImageVqConfig(size=8, down=(4,), widths=(8,), blocks=(1,), quantizer="vq"))
        for _ in range(2)
    )
    a = run_step(objective, [batch(image)], HandEnv({"model": one}))
    b = run_step(objective, [batch(padded, torch.tensor([3, 3, 3, 0]))], HandEnv({"model": two}))
    assert a == pytest.approx(b, rel=1e-5)
    for key, grad in gradients(one).items():
        torch.testing.assert_close(gradients(two)[key], grad, rtol=1e-4, atol=1e-7)
    assert objective.counts(batch(torch.zeros(1, 3, 8, 8), torch.zeros(1)))["reconstruction"] == 0


def test_warm_up_leaves_the_quantizer_out() -> None:
    objective = VqObjectiveConfig(bypass_steps=2).build()
    assert [objective.scheduled(step, None)["bypass"] for step in range(4)] == [1, 1, 0, 0]
    net = build(
        ImageVqConfig(
            size=8, down=(4,), widths=(8,), blocks=(0,), quantizer={"kind": "fsq", "levels": (2,)}
        )
    ).eval()
    image = torch.rand(16, 3, 8, 8)
    soft = net(batch(image), scheduled={"bypass": 1.0}).intermediates["image"]
    hard = net(batch(image), scheduled={"bypass": 0.0}).intermediates["image"]
    assert not torch.allclose(soft, hard)
    means = run_step(
        objective, [batch(image)], HandEnv({"model": build(ImageVqConfig(quantizer="vq", size=8))})
    )
    assert means["commitment"] == 0


def test_the_critic_waits_for_its_step_then_both_networks_step_once() -> None:
    critic = {
        "critic": {"kind": "patch_critic", "width": 8, "depth": 2},
        "start_step": 1,
        "weight": 0.1,
    }
    objective = VqObjectiveConfig(adversarial=critic).build()
    assert (
        objective.networks["critic"].mode == "train" and VqObjectiveConfig().build().networks == {}
    )
    nets = {
        "model": build(ImageVqConfig.smallest()),
        "critic": build(PatchCriticConfig(width=8, depth=2)),
    }
    env = HandEnv(nets)
    micros = [batch(x) for x in torch.rand(4, 3, 8, 8).split(2)]
    calls = {name: net for name, net in nets.items()}
    assert [(t.network, t.step) for t in objective.terms(micros, calls, env)] == [
        ("model", False),
        ("model", True),
    ]
    env.step = 1
    terms = [(t.network, t.step, set(t.losses)) for t in objective.terms(micros, calls, env)]
    model = {"reconstruction", "adversarial", "feature"}
    assert terms == [
        ("critic", False, {"critic"}),
        ("critic", True, {"critic"}),
        ("model", False, model),
        ("model", True, model),
    ]


def test_each_pass_moves_its_own_network_only() -> None:
    critic = {"critic": {"kind": "patch_critic", "width": 8, "depth": 2}, "start_step": 0}
    objective = VqObjectiveConfig(adversarial=critic).build()
    nets = {
        "model": build(ImageVqConfig.smallest()),
        "critic": build(PatchCriticConfig(width=8, depth=2)),
    }
    env = HandEnv(nets)
    for term in objective.terms([batch(torch.rand(4, 3, 8, 8))], nets, env):
        for net in nets.values():
            net.zero_grad()
        torch.stack(list(term.losses.values())).sum().backward()
        other = nets["critic" if term.network == "model" else "model"]
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())
        assert any(p.grad is not None and p.grad.any() for p in nets[term.network].parameters())
    assert all(p.requires_grad for p in nets["critic"].parameters())


def test_a_critic_learns_to_tell_noise_from_digits() -> None:
    real, _ = digits()
    critic = build(PatchCriticConfig(channels=1, width=8, depth=2))
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3)
    from mm.objectives import adversarial

    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        x = real[torch.randint(0, len(real), (16,), generator=generator)]
        fake = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        (term,) = adversarial.critic_terms(critic, [batch(x)], [batch(fake)])
        loss = term.losses["critic"] / 16
        if step == 0:
            assert float(loss.detach()) == pytest.approx(2.0, abs=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.0
