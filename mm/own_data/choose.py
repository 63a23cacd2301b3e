"""Choose what fits the data: a pure function from what was seen to configs and commands.

No file is read or written here; the speed of this machine comes in as a function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from mm.errors import UserError
from mm.own_data import pictures, tokenizers, training
from mm.own_data.look import Found
from mm.own_data.plan import Chosen, Plan, Step, plain
from mm.own_data.training import Speed

SHARES = (0.1, 0.2, 0.3, 0.5)
START_SECONDS = 25  # of importing, reporting and packing, over all steps
COPY_SECONDS = 0.0025  # to vary a value and turn it to ids
EVAL_SHARE = 0.15  # of the minutes at most, for `mm eval`


class Options(NamedTuple):
    """What the user may say: see `mm init --help`."""

    out: Path
    minutes: float = 10.0
    text: Literal["auto", "bytes", "bpe"] = "auto"
    image_size: int | None = None
    val_share: float | None = None


def choose(found: Found, options: Options, speed: Speed) -> Plan:
    """Configs and commands for a source.

    Args:
        found: what `mm.own_data.look.look` saw.
        options: what the user said.
        speed: seconds of an optimizer step of a model on this machine, see `training.Speed`.
    Raises:
        UserError: the source is too small to hold anything out.
    """
    found, pack, share, notes = packing(found, options)
    out, plans, names = options.out, [], {}
    for modality in found.modalities:
        if modality == "text":
            alone = found.modalities == ("text",)
            plans.append(tokenizers.of_text(found, options.text, alone))
        elif modality == "image":
            plans.append(
                tokenizers.of_image(found, out / "data", options.image_size, options.minutes)
            )
        elif modality == "audio":
            plans.append(tokenizers.of_audio(found, out / "data", options.minutes))
        else:
            raise UserError(
                f"{found.src}: mm init knows no tokenizer of '{modality}'; write the configs by "
                "hand: docs/how-to/modality.md"
            )
        names[modality] = plans[-1].modality
    n_train = len(found.keys) - (found.held_out(share) if share else 0)
    if pictures.few_pictures(found, n_train):
        image = next(plan for plan in plans if plan.modality == "image")
        plans.append(tokenizers.of_pixels(plain(image.config)["model"]["size"]))
    copies = training.copies(found, n_train)
    split = "test" if found.splits.get("test") else "val"
    spent = {
        "tokenizers": sum(plan.cpu_seconds for plan in plans),
        "packing and starts": START_SECONDS
        + COPY_SECONDS * n_train * (copies.value if copies else 0),
    }
    left = 60 * options.minutes * (1 - EVAL_SHARE) - sum(spent.values())
    taken: list[float] = []

    def step_seconds(*of: Any) -> float:
        taken.append(speed(*of))
        return taken[-1]

    train = training.train_config(
        found,
        out,
        plans,
        names,
        split=split,
        share=share,
        seconds=max(5.0, left),
        speed=step_seconds,
        n_train=n_train,
        copies=copies.value if copies else 1,
    )
    spent["backbone"] = taken[-1] * plain(train)["stages"][0]["budget"]["steps"]
    parts = ", ".join(f"{part} {seconds / 60:.1f}" for part, seconds in spent.items())
    minutes = sum(spent.values()) / 60
    notes.append(
        Chosen(
            "time", f"about {minutes:.0f} minutes on this machine when idle: {parts}; and figures"
        )
    )
    configs = {f"tokenizer-{p.modality}.yaml": p.config for p in plans} | {"train.yaml": train}
    return Plan(configs, tuple(_steps(out, plans, pack, copies, split)), tuple(notes))


def packing(found: Found, options: Options) -> tuple[Found, Step, float, list[Chosen]]:
    """The first command, what it makes of the source, and what to tell."""
    words, notes = ["data", "pack", str(found.src), "--out", str(options.out / "data")], []
    samples = ", ".join(f"{n:,} of {'+'.join(p)}" for p, n in found.pairs.items())
    notes.append(Chosen("samples", samples))
    if found.bad:
        notes.append(Chosen("unreadable", f"{len(found.bad)} seen, such as: {found.bad[0]}"))
    classes = found.classes
    if classes is not None:
        first = ", ".join(classes.words[:4])
        told = {
            "caption": "what the captions are",
            "label": "what the column label says",
            "parent": "names of the folders: --caption-from parent",
        }.get(classes.where, "how the files' names begin: --caption-regex")
        notes.append(Chosen("classes", f"{len(classes.words)} ({first}, ...), {told}"))
        if classes.where == "parent":
            words += ["--caption-from", "parent"]
        elif classes.where not in ("caption", "label"):
            words += ["--caption-regex", classes.where]
        if classes.where not in ("caption", "label"):
            found = _with_captions(found)
    if len(found.pairs) > 1:
        words += ["--incomplete", "keep"] if found.kind == "folder" else []
        notes.append(Chosen("pairs", "samples with fewer modalities are kept: --incomplete keep"))
    if found.splits.get("val"):
        notes.append(
            Chosen("val", f"{found.splits['val']:,} samples are named val, or valid, or dev")
        )
        return found, Step(tuple(words), "raw files to checked shards"), 0.0, notes
    shares = SHARES if options.val_share is None else (options.val_share,)
    n = len(found.keys)
    share = next((s for s in shares if 0 < found.held_out(s) < n), None)
    if share is None:
        raise UserError(
            f"{found.src}: {n} samples to train on, too few to hold any out: give "
            "more, or put some into a folder called val"
        )
    words += ["--val-share", str(share)]
    where = "the end of the file" if found.kind == "text" else "by the hash of its name"
    notes.append(Chosen("val", f"{found.held_out(share):,} samples are held out ({where})"))
    return found, Step(tuple(words), "raw files to checked shards, some held out"), share, notes


def _with_captions(found: Found) -> Found:
    """The source as it is packed: the class becomes the caption of every sample."""
    from mm.own_data.look import TextStatistics

    assert found.classes is not None
    sizes = [len(word.encode()) for word in found.classes.words]
    mean = sum(sizes) / len(sizes)
    text = TextStatistics(found.samples, round(mean * found.samples), mean, max(sizes))
    pairs = {tuple(sorted({*pair, "text"})): n for pair, n in found.pairs.items()}
    return found._replace(text=text, pairs=pairs)


def _steps(
    out: Path, plans: list[tokenizers.TokenizerPlan], pack: Step, copies: Chosen | None, split: str
) -> list[Step]:
    data, tokens, run = str(out / "data"), str(out / "tokens"), str(out / "runs" / "first")
    steps = [pack]
    for plan in plans:
        config = str(out / f"tokenizer-{plan.modality}.yaml")
        folder = str(out / "tokenizers" / plan.modality)
        train = ("tokenizer", "train", config, "--data", data, "--out", folder)
        steps.append(Step(train, f"{plan.modality} to ids"))
        measure = ("tokenizer", "eval", folder, "--data", data, "--split", split)
        measure += ("--out", f"{folder}/eval", "--json", f"{folder}/eval.json")
        if plan.modality not in ("bytes", tokenizers.PIXELS):  # they keep all of it
            steps.append(Step(measure, "what it keeps of held-out data; look into its folder eval"))
    words = ("data", "pack", data, "--tokenizers", str(out / "tokenizers"), "--out", tokens)
    why = "every sample to ids"
    if copies is not None:
        words, why = (*words, "--copies", str(copies.value)), f"{why}; {copies.why}"
    steps.append(Step(words, why))
    steps.append(Step(("train", str(out / "train.yaml")), "the backbone"))
    steps.append(Step(("eval", run, "--json", f"{run}/results.json"), "figures on held-out data"))
    steps.append(Step(("report", run), "one page of all of it"))
    return steps
