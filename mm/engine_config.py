"""`engine`: how networks are split over processes, in what precision, and how they communicate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mm.config import Config

Place = Literal["device", "cpu", "nvme"]


class Communication(Config):
    """What processes send each other, and when."""

    overlap_comm: Annotated[
        bool | None,
        Field(
            description="sum gradients while the backward still runs; default: on a GPU with "
            "several processes"
        ),
    ] = None
    bucket_size: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(
            description="gradients summed in one message, and weights gathered in one, elements; "
            "default: up to 200 million"
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(
            description="of gradients on the way between processes, and at ZeRO stage 3 under "
            "autocast of weights, too; auto: as they lie"
        ),
    ] = "auto"
    hpz_partition_size: Annotated[
        int,
        Field(
            ge=1,
            le=65_536,
            description="ZeRO stage 3: so many neighbouring processes, as a rule those of one "
            "machine, keep all weights among them after a forward, and the backward gathers them "
            "there (ZeRO++, arXiv:2306.10209); costs the weights / hpz_partition_size in memory",
        ),
    ] = 1
    quantized_weights: Annotated[
        bool,
        Field(description="ZeRO stage 3 on GPUs: weights travel in 8 bits (ZeRO++)"),
    ] = False
    quantized_gradients: Annotated[
        bool, Field(description="gradients in 4 bits (ZeRO++): refused, see docs/how-to/zero.md")
    ] = False


class Offload(Config):
    """What lies outside the device's memory between its uses."""

    optimizer: Annotated[
        Place,
        Field(
            description="fp32 masters and optimizer states, which the host then updates; from ZeRO "
            "stage 1 on; nvme: stage 3"
        ),
    ] = "device"
    parameters: Annotated[
        Place, Field(description="this process's slices of the weights; ZeRO stage 3")
    ] = "device"
    folder: Annotated[
        Path | None, Field(description="on a disk of this machine, for `nvme`; swap files go there")
    ] = None

    @property
    def places(self) -> tuple[Place, Place]:
        return self.optimizer, self.parameters

    @model_validator(mode="after")
    def _nvme_has_a_folder(self) -> Offload:
        if "nvme" in self.places and self.folder is None:
            raise ValueError("offload.folder: nvme needs a folder on a disk of this machine")
        return self


class EngineConfig(Config):
    """DeepSpeed settings; its JSON is derived from these (mm/trainer/engine/settings.py)."""

    zero_stage: Annotated[
        Literal[0, 1, 2, 3],
        Field(
            description="what DeepSpeed splits over processes: 1 optimizer state, 2 gradients too, "
            "3 weights too"
        ),
    ] = 1
    precision: Annotated[
        Literal["auto", "fp32", "autocast_bf16", "bf16"],
        Field(description="bf16: the weights, too; ZeRO stage 0 is stage 1 then"),
    ] = "auto"
    grad_clip: Annotated[float, Field(ge=0, description="global gradient norm; 0 = off")] = 1.0
    max_skips: Annotated[
        int, Field(ge=0, description="non-finite steps tolerated in `guard.window`")
    ] = 3
    threads: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None,
        Field(description="CPU threads a process; default: cores / processes on this machine"),
    ] = None
    sequence: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="processes that share the tokens of each row: for rows that do not fit "
            "one; attention takes a share of the heads, recurrences pass their states",
        ),
    ] = 1
    compile: Annotated[
        bool, Field(description="torch.compile of every block; a minute or more at the start")
    ] = False
    cuda_graphs: Annotated[
        bool,
        Field(
            description="with `compile`, on a GPU: the kernels of a block are launched as one CUDA "
            "graph (Inductor's `reduce-overhead`); no GPU has run it yet"
        ),
    ] = False
    combo_kernels: Annotated[
        bool,
        Field(
            description="with `compile`, on a GPU: generated elementwise kernels that do not wait "
            "for one another are launched as one (Inductor's `combo_kernels`, experimental there); "
            "no GPU has run it yet"
        ),
    ] = False
    communication: Annotated[
        Communication, Field(description="messages between processes: overlap, sizes, dtype")
    ] = Communication()
    offload: Annotated[
        Offload, Field(description="optimizer and weights outside the device's memory")
    ] = Offload()

    @property
    def effective_zero_stage(self) -> int:
        """The ZeRO stage that runs.

        Weights in bf16 have masters in fp32, which DeepSpeed splits over ranks at stage 0 as well,
        by other code than stage 1's: there is one way here.
        """
        return self.zero_stage or int(self.precision == "bf16")

    @model_validator(mode="after")
    def _stage_can(self) -> EngineConfig:
        stage, wire, offload = self.effective_zero_stage, self.communication, self.offload
        from_stage = (
            ("communication.hpz_partition_size", wire.hpz_partition_size > 1, 3),
            ("communication.quantized_weights", wire.quantized_weights, 3),
            ("offload.parameters", offload.parameters != "device", 3),
            ("offload.optimizer: nvme", offload.optimizer == "nvme", 3),
            ("offload.optimizer", offload.optimizer != "device", 1),
        )
        for key, asked, least in from_stage:
            if asked and stage < least:
                raise ValueError(f"{key}: needs zero_stage: {least}, and it is {stage}")
        return self

    def compile_options(self, device: str) -> dict[str, bool]:
        """Options of Inductor on a type of device."""
        asked = {
            "triton.cudagraphs": self.cuda_graphs,
            "combo_kernels": self.combo_kernels,
            # Of reductions it writes code that is no Python (torch 2.14, log-linear attention).
            "combo_kernels_pointwise_only": self.combo_kernels,
        }
        return {name: True for name, on in asked.items() if on and device == "cuda"}

    @model_validator(mode="after")
    def _compiler_can(self) -> EngineConfig:
        for key, on in (("cuda_graphs", self.cuda_graphs), ("combo_kernels", self.combo_kernels)):
            if on and not self.compile:
                raise ValueError(f"{key}: a setting of compiled blocks; set compile: true")
        if self.cuda_graphs and self.offload.optimizer != "device":
            raise ValueError(
                "cuda_graphs: offload.optimizer copies gradients to the host on a stream of its "
                "own, while the next graph writes into their memory; set one of the two off"
            )
        return self
