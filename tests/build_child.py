"""Child of test_module_by_module, under torchrun: peaks of a network cut as it is filled.

Arguments: a YAML of the network, where each process writes ``N.json``.
"""

import gc
import json
import sys
from pathlib import Path

from mm.launch import environment

environment.prepare()

if __name__ == "__main__":
    import torch

    from mm import config as yaml_config
    from mm.model.by_module import build_empty, units
    from mm.plan.tally import Measure
    from mm.registry import NETWORKS
    from mm.run import EngineConfig
    from mm.trainer.begin_weights import fill_cut
    from mm.trainer.engine.cutter import Cutter
    from mm.trainer.engine.process_group import join
    from mm.trainer.stage import make_module

    device = join(1)
    me = environment.ranks()
    config = NETWORKS.parse(yaml_config.read(sys.argv[1]))
    whole = make_module(config, None, 5, device).state_dict()
    network = build_empty(config.build, device)
    size = lambda modules: sum(
        p.numel() * 4 for p in {p for m in modules for p in m.parameters(recurse=False)}
    )
    parts = [size(module for _, module in unit.parts) for unit in units(network)]
    facts = {"weights": size(network.modules()), "largest": max(parts), "units": len(parts)}
    cutter = Cutter(EngineConfig(zero_stage=3), "fp32", facts["weights"] // 4)
    with Measure() as found:
        before = found.live.now
        fill_cut(network, device, 5, cutter, {})
        facts["peak"] = found.live.peak - before
        gc.collect()  # DeepSpeed leaves cycles, which now and then still hold the last matrix
        facts["after"] = found.live.now - before

    def own(name: str, p: torch.Tensor) -> bool:
        part = p.ds_tensor  # type: ignore[attr-defined]
        flat = whole[name].reshape(-1)[me.rank * part.numel() :][: part.numel()]
        return torch.equal(part[: flat.numel()], flat)

    facts["same"] = all(own(name, p) for name, p in network.named_parameters())
    (Path(sys.argv[2]) / f"{me.rank}.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
