"""The model's config in a stage: the run's, under the stage's own mask."""

from __future__ import annotations

from typing import Any

from mm.config import validate
from mm.errors import UserError
from mm.run import Run


def model_of(run: Run, index: int) -> Any:
    """The model's config in a stage.

    Raises UserError where the stage has a mask that this model cannot have.
    """
    mask = run.stages[index].mask
    if mask is None:
        return run.model
    kind = type(run.model)
    if "mask" not in kind.model_fields:
        raise UserError(f"stages.{index}.mask: the network '{run.model.kind}' has no mask")
    return validate(kind, run.model.to_dict() | {"mask": mask}, f"stages.{index}")


def run_of(run: Run, index: int) -> Run:
    """The run with the model's config of a stage."""
    return run.model_copy(update={"model": model_of(run, index)})
