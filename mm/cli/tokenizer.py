"""`mm tokenizer`: train one on packed data, and measure one on held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    console,
    existing,
    figures,
    is_main,
    overrides,
    write_json,
)
from mm.cli.trained import print_trained
from mm.errors import UserError

app = typer.Typer(
    no_args_is_help=True, help="Train a tokenizer on packed data, or measure one on held-out data."
)


@app.command(
    help="Train the tokenizer of CONFIG on the train split of SHARDS.\n\nA YAML with `tokenizer:` "
    "(bpe, bytes) is fitted on "
    "the text; a Run YAML (image_vq, audio_codec) goes through the trainer, and the same "
    "command again resumes it.",
    context_settings=PASS_OVERRIDES,
)
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML, or the name of a shipped one.")
    ],
    changes: Overrides = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="SHARDS", help="Packed raw data (mm data pack)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Run folder; its model/ is the tokenizer."),
    ] = None,
    json: JsonFile = None,
) -> None:
    from mm import config as configs
    from mm.cli.schema import resolve

    assignments = overrides(changes)
    if data is not None:
        existing(data, "packed data", f"make it with: mm data pack SRC --out {data}")
    if "tokenizer" in configs.read(config):
        if data is None or out is None:
            raise UserError(f"{config}: fitting needs --data SHARDS and --out DIR")
        chosen: Any = resolve(config, assignments)
        result = fit(chosen.tokenizer, data, out, configs.dump(chosen))
        figures(f"Tokenizer {out}", result)
    else:
        if data is not None:
            assignments.append(f"stages.0.data.path={data}")
        if out is not None:
            assignments += [f"name={out.name}", f"out={out.parent}"]
        from mm.trainer import loop

        result = loop.train(config, assignments)
        if is_main():
            print_trained(f"Tokenizer {out or config}", result)
    if is_main() and out:
        console().print(next_command(out, data, bool(result.get("continuous"))))
    write_json(json, result)


def next_command(out: Path, data: Path | None, continuous: bool = False) -> str:
    """What to run after a training: the measure on a split that the data have.

    ``continuous``: it gives values as they are, of which there is nothing to measure.
    """
    from mm.data.shards.manifest import split_samples

    if continuous:
        return f"next: mm data pack {data or 'SHARDS'} --tokenizers {out.parent} --out TOKENS"
    held_out = [s for s in ("test", "val") if data is not None and split_samples(data, s)]
    if data is not None and not held_out:
        return (
            f"{data} has no split 'test' or 'val': to measure {out} on held-out data, pack them "
            "with --val-share 0.05 and train again"
        )
    split = "" if "test" in held_out or data is None else f" --split {held_out[0]}"
    return f"next: mm tokenizer eval {out} --data {data or 'SHARDS'}{split}"


def fit(chosen: Any, data: Path, out: Path, config: str) -> dict[str, Any]:
    """Fit a tokenizer without gradients on the train split; save it as ``out/model``.

    Raises:
        UserError: the kind cannot be fitted, or the split has nothing of its modality.
    """
    from mm.data.modalities.base import TEXT, get_modality, table
    from mm.data.shards.reader import ShardSet

    if not hasattr(chosen, "fit"):
        raise UserError(
            f"tokenizer '{chosen.kind}' is trained, not fitted: give a Run YAML, such as "
            "configs/tokenizer/image.yaml"
        )
    shards = ShardSet.open(data, split="train")
    # A modality of one's own name, such as `code`, is text.
    own = get_modality(table().raw.get(chosen.modality, TEXT))
    found = shards.each(own.kind)
    if not found:
        raise UserError(
            f"{data}: no {own.kind} in split 'train'; see what it has with: mm data inspect {data}"
        )

    def values() -> Iterator[Any]:
        for i, member in found:
            raw = shards.raw(i, member)  # alone: decoding the pictures beside it would cost minutes
            if raw is not None:
                yield own.decode(raw[1])

    tokenizer = chosen.fit(values())
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "model")
    (out / "config.yaml").write_text(config, encoding="utf-8")
    spec = tokenizer.spec
    return {
        "modality": spec.modality,
        "vocab_size": spec.vocab_size,
        "continuous": spec.continuous,
        "items": len(found),
        "fingerprint": spec.fingerprint[:12],
        "folder": out,
    }


@app.command(
    name="eval",
    help="Measure a tokenizer on held-out data: length, distortion, rate, codebook "
    "usage.\n\nAlerts when under half the codes are used.",
)
def evaluate(
    tokenizer: Annotated[
        Path, typer.Argument(metavar="TOKENIZER", help="Tokenizer folder, or its run folder.")
    ],
    data: Annotated[
        Path, typer.Option("--data", metavar="SHARDS", help="Packed raw data (mm data pack).")
    ],
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "test",
    limit: Annotated[int, typer.Option(min=1, help="Samples at most, evenly spread.")] = 2000,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Also write originals and reconstructions here."
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    existing(
        tokenizer, "tokenizer", "make one with: mm tokenizer train CONFIG --data SHARDS --out DIR"
    )
    existing(data, "packed data", f"make it with: mm data pack SRC --out {data}")
    from mm.tokenizers.evaluate import evaluate as measure
    from mm.tokenizers.load import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    raws = read_raws(data, split, loaded, limit)
    result = measure(loaded, raws, out)
    figures(
        f"{tokenizer}: {split} split of {data}", {k: v for k, v in result.items() if k != "alerts"}
    )
    for alert in result["alerts"]:
        console().print(f"alert: {alert}", style="yellow", markup=False)
    write_json(json, {"tokenizer": tokenizer, "data": data, "split": split, **result})


def read_raws(data: Path, split: str, tokenizer: Any, limit: int) -> list[Any]:
    """At most ``limit`` values that a tokenizer reads, evenly spread over a split.

    Raises UserError when it has none.
    """
    from mm.data.modalities.base import raw_modality
    from mm.data.shards.reader import ShardSet

    shards = ShardSet.open(data, split=split)
    raw = raw_modality(tokenizer.spec.modality)
    having = shards.each(raw.kind)
    if not having:
        raise UserError(
            f"{data}: no {raw.kind} in split '{split}'; see what it has with: mm data inspect "
            f"{data}"
        )
    n = min(limit, len(having))
    found = (shards.raw(*having[i * len(having) // n]) for i in range(n))
    return [raw.read(member[1], tokenizer) for member in found if member is not None]
