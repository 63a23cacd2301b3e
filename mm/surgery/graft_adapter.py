"""An adapter that was trained elsewhere becomes one of a model's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from mm.config import validate
from mm.errors import UserError
from mm.model.folder import load_tensors, read_config
from mm.model.layer import init_weights
from mm.registry import ADAPTERS, SURGERIES
from mm.surgery.base import Operated, Surgery, replace_tensors, select_tensors
from mm.vocabulary import Vocabulary


@SURGERIES.register("graft_adapter")
class GraftAdapter(Surgery):
    """The adapter of a folder that `mm import` wrote, for one modality's values.

    What the folder lacks, the projection to the model's width, begins fresh, from a fixed seed.
    """

    kind: Literal["graft_adapter"] = "graft_adapter"
    keeps_function: ClassVar[bool] = True
    modality: Annotated[str, Field(description="whose values it reads")] = "image"
    path: Annotated[Path, Field(description="what `mm import` wrote of an encoder")] = Path()

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        if not hasattr(before.config, "adapters"):
            raise UserError("surgery 'graft_adapter' needs a language model")
        values = read_config(self.path)
        kind = str(values.get("kind"))
        if kind not in ADAPTERS:
            raise UserError(f"{self.path}: a saved '{kind}' is no adapter")
        config = validate(ADAPTERS.get(kind), values, str(self.path / "config.json"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = config.build(before.config.d_model)
            init_weights(module)
        own = load_tensors(self.path)
        _, unexpected = module.load_state_dict(own, strict=False)
        if unexpected:
            raise UserError(f"{self.path}: holds {unexpected[0]}, which '{kind}' has not")
        place = f"adapters.{self.modality}."
        kept = {name: name for name in before.tensors if not name.startswith(place)}
        tensors = {f"{place}{n}": t for n, t in module.state_dict().items()}
        made = {name: (t.to("meta"), lambda t=t: t) for name, t in tensors.items()}
        adapters = {**before.config.adapters, self.modality: config}
        after = before.config.model_copy(update={"adapters": adapters})
        whole = replace_tensors(select_tensors(before.tensors, kept), made)
        return Operated(after, whole, before.vocabulary)
