"""A saved view of a W&B project: panels in the order in which somebody with forty runs looks."""

from __future__ import annotations

from typing import Any

from mm.errors import UserError

# Section -> panels: a title, and the metrics or (with .*) patterns of metrics that it draws.
SECTIONS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "Is it sick": (
        ("held-out loss", ("val/loss",)),
        ("training loss", ("loss/total",)),
        ("gradient norm", ("optim/grad_norm",)),
        ("steps left out", ("skipped",)),
        ("tokens a second and device", ("perf/tokens_per_second_device",)),
        ("learning rate", ("optim/lr",)),
    ),
    "Modalities": (
        ("loss", ("loss/.*",)),
        ("held-out bits per byte", ("val/.*/bits_per_byte",)),
        ("accuracy of the next token", ("accuracy/.*",)),
        ("share of targets", ("targets/.*_share",)),
        ("wanted share", ("targets/.*_wanted",)),
        ("gradient in the tables", ("grad/.*",)),
        ("codebook usage", ("codebook.*/usage",)),
        ("dead codes", ("codebook.*/dead_codes",)),
    ),
    "Machine": (
        ("MFU", ("perf/mfu",)),
        ("parts of a step", ("time/.*",)),
        ("slowest rank", ("ranks/slowest_seconds", "ranks/median_seconds")),
        ("memory", ("memory/.*",)),
    ),
    "Samples": (("samples", ("samples",)),),
    "Tasks": (("figures", ("eval/.*",)),),
    "Layers": (
        ("activations", ("layers/.*/activation_rms",)),
        ("gradients", ("layers/.*/gradient_rms",)),
        ("attention entropy", ("layers/.*/attention_entropy",)),
        ("state", ("layers/.*/state_rms",)),
        ("decay", ("layers/.*/decay",)),
        ("experts", ("layers/.*/load_max",)),
    ),
}
TABLES = ("samples",)


def make_workspace(entity: str, project: str, name: str) -> Any:
    """A `wandb_workspaces.workspaces.Workspace` with `SECTIONS`; nothing is sent yet.

    Raises UserError without the package.
    """
    try:
        import wandb_workspaces.reports.v2 as wr  # pyright: ignore[reportMissingImports]
        import wandb_workspaces.workspaces as ws  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            f"a view needs the package '{error.name}': pip install 'mm-stack[workspace]'"
        ) from error
    sections = []
    for title, panels in SECTIONS.items():
        made = []
        for label, keys in panels:
            if keys[0] in TABLES:
                made.append(wr.WeavePanelSummaryTable(table_name=keys[0]))
            elif any(".*" in key for key in keys):
                made.append(wr.LinePlot(title=label, x="step", metric_regex="|".join(keys)))
            else:
                made.append(wr.LinePlot(title=label, x="step", y=list(keys)))
        is_open = title != "Layers"
        sections.append(ws.Section(name=title, panels=made, is_open=is_open))
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections)
