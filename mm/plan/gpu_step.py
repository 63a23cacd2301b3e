"""A step on one GPU of a card, eager and compiled: predicted from what it launches on fake tensors.

The rates are those of `mm.plan.speed`. An operator takes the longer of its arithmetic and its
traffic; Python launches one kernel after the other, `Gpu.launch_s` each, ahead of the GPU, which
waits where it is the faster of the two: a step takes the longer of both sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mm.plan.launches import Launches, LayerLaunches
from mm.plan.networks import Networks
from mm.plan.speed import network_seconds, operator_times
from mm.plan.trace import Trace, Work
from mm.plan.zero import When, Zero
from mm.trainer.data_sheets import Gpu

OPTIMIZER = "aten::_fused_"
BACKWARD = 2 / 3  # of what the operators of a step take


@dataclass(frozen=True)
class GpuStep:
    """A predicted step of one GPU.

    Attributes:
        launches: kernels of the step.
        busy: seconds that the GPU computes, and waits for the network.
        issue: seconds that Python takes to launch.
        flops: of the model, without what is made again.
    """

    launches: int
    busy: float
    issue: float
    flops: float
    tokens: int
    peak: float

    @property
    def seconds(self) -> float:
        return max(self.busy, self.issue)

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations reach."""
        return self.flops / self.seconds / self.peak


def busy_seconds(work: Sequence[Work], gpu: Gpu) -> float:
    """Seconds of operators whose launch costs nothing."""
    return sum(operator_times(Trace(work=list(work)), replace(gpu, launch_s=0.0)).values())


def predict(
    layers: Sequence[LayerLaunches], step: Launches, net: Networks, gpu: Gpu, tokens: int,
    compiled: bool, stage: int = 0, world: int = 1, overlap: bool = False,
) -> GpuStep:  # fmt: skip
    """Predict a step of one micro-batch.

    Args:
        layers, step: of `step_launches` with ``whole``.
        compiled: every block by Inductor, all else in eager mode.
        stage, world: of ZeRO, over the GPUs of one node.
        overlap: gradients are summed while the backward runs.
    """
    shared = lambda w: w._replace(bytes=w.bytes // world) if w.name.startswith(OPTIMIZER) else w
    busy = busy_seconds([shared(w) for w in step.work], gpu)
    launches = step.total
    for layer in layers if compiled else ():
        if layer.compiled is None:
            continue
        # what Inductor calls as it is; it writes the others
        called = [w for w in layer.work if w.flops or w.name.startswith("mm::")]
        alone = busy_seconds(called, gpu)
        alone += busy_seconds([Work("", "", "", 0.0, layer.traffic, called[0].dtype)], gpu)
        busy += layer.layers * (alone - busy_seconds(layer.work, gpu))
        launches += layer.layers * (layer.compiled - layer.eager)
    if world > 1:
        backward = BACKWARD * busy
        compute: dict[When, float] = {
            "forward": busy - backward,
            "backward": backward,
            "last backward": backward,
            "step": 0.0,
        }
        busy += network_seconds(net, gpu, Zero(stage, world, overlap), world, 1, compute)[0]
    return GpuStep(launches, busy, launches * gpu.launch_s, step.flops, tokens, gpu.bf16)
