"""What a pack is asked for: the arguments of `mm.pack` and the options of `mm data pack`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from mm.config import Config
from mm.data.modalities.base import get_modality, table
from mm.data.sources.base import SAFE_SPLIT, SPLITS
from mm.errors import UserError, did_you_mean
from mm.vocabulary import Vocabulary


class Option(NamedTuple):
    """How a field is written on the command line, where its name does not say it."""

    metavar: str | None = None
    flags: tuple[str, ...] = ()  # default: the field's name


Words = dict[str, str] | None  # NAME=VALUE, repeatable


class PackConfig(Config):
    """See `mm.data.pack.job.PackJob`. The descriptions are the help of `mm data pack`."""

    src: Path
    out: Annotated[
        Path,
        Field(description="New folder; it appears when it is complete."),
        Option("DIR", ("--out", "-o")),
    ]
    tokenizers: Annotated[
        # Python also takes modality -> folder or `ModalityTokenizer`
        Path | Mapping[str, Any] | None,
        Field(description="Folder of one tokenizer a modality; the shards then hold tokens."),
        Option("DIR"),
    ] = None
    vocabulary: Annotated[
        Path | Vocabulary | None,
        Field(description="Older vocabulary.json, to be appended to."),
        Option("FILE"),
    ] = None
    source: Annotated[
        str | None,
        Field(
            description="folder, jsonl, json, csv, parquet, hf, chat, text or shards, where SRC's "
            "name does not tell."
        ),
        Option("KIND"),
    ] = None
    columns: Annotated[
        Words,
        Field(
            description="Of a manifest, such as image=img_path; repeatable. Default: the columns "
            "called text, image, ..., else segments=COLUMN: lists of {modality: value}, "
            "interleaved samples."
        ),
        Option("MODALITY=COLUMN", ("--column",)),
    ] = None
    root: Annotated[
        Path | None,
        Field(description="Where a manifest's relative paths start; default its own folder."),
        Option("DIR"),
    ] = None
    caption_from: Annotated[
        str | None,
        Field(description="`parent`: the caption is the name of the folder that a file lies in."),
        Option("parent"),
    ] = None
    caption_regex: Annotated[
        str | None,
        Field(description="On a file's name; the caption is its group `text` (or the first)."),
        Option("REGEX"),
    ] = None
    caption_map: Annotated[
        Words,
        Field(description="Replaces what was found; repeatable."),
        Option("FOUND=CAPTION"),
    ] = None
    incomplete: Annotated[
        str | None,
        Field(description="Samples that lack a modality the others have."),
        Option("keep|reject"),
    ] = None
    split: Annotated[
        str | None,
        Field(description="Put all samples into this split; default what the source says."),
        Option("NAME"),
    ] = None
    val_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of train that becomes val, by hash of the key (of a text file: its "
            "end).",
        ),
    ] = 0.0
    document_bytes: Annotated[
        int | None, Field(ge=1, description="Length of the documents of one text file.")
    ] = None
    shard_mb: Annotated[float, Field(gt=0, description="Size of a shard in 10**6 bytes.")] = 64.0
    max_bad: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of samples that may be unreadable; one never stops a pack.",
        ),
    ] = 0.01
    overwrite: Annotated[
        bool, Field(description="Replace a pack of other content or settings.")
    ] = False
    segments: Annotated[
        bool,
        Field(
            description="a.000.txt, a.001.png, a.002.txt of a folder are one interleaved sample."
        ),
    ] = False
    follow_links: Annotated[
        bool,
        Field(
            description="Read what links of a folder lead to, also outside of it; default: they "
            "are refused and listed."
        ),
    ] = False
    tokenized: Annotated[
        bool,
        Field(
            description="The columns hold lists of token ids, made by --tokenizers (also a "
            "tokenizer.json; default the one beside SRC)."
        ),
    ] = False
    map: Annotated[
        Words,
        Field(
            description="Of conversations: messages=COLUMN, or user=, assistant=, system=, input= "
            "and image=, ... ; repeatable. Default: guessed and printed."
        ),
        Option("NAME=COLUMN", ("--map",)),
    ] = None
    template: Annotated[
        Path | None,
        Field(
            description="Chat template (Jinja); `default` is this project's. Default: the text "
            "tokenizer's own, else this project's."
        ),
        Option("FILE"),
    ] = None
    loss: Annotated[
        str,
        Field(
            pattern="^(assistant|all)$",
            description="Of conversations: what is learnt, the turns of the assistant or all.",
        ),
        Option("assistant|all"),
    ] = "assistant"
    max_tokens: Annotated[
        int | None,
        Field(ge=1, description="Of conversations: longer ones are left out and counted."),
    ] = None
    license: Annotated[str, Field(description="Goes into the manifest."), Option("TEXT")] = ""
    dedupe: Annotated[
        str | None,
        Field(description="Leave out samples whose content (or that modality) came before."),
        Option("sample|MODALITY"),
    ] = None
    copies: Annotated[
        int,
        Field(
            ge=1,
            description="Of every training sample: itself and varied ones (pictures moved, turned, "
            "mirrored; recordings faster, slower), for small data. SRC must be packed: its splits "
            "are known.",
        ),
    ] = 1
    workers: Annotated[
        int | None,
        Field(
            ge=1,
            description="Processes that read, check and encode samples; they change no byte. "
            "Default one a core.",
        ),
    ] = None
    # Settings of modalities, such as {"image": {"max_pixels": 1000000}}:
    limits: dict[str, dict[str, Any]] = {}

    @classmethod
    def option(cls, name: str) -> Option:
        """How a field is written on the command line."""
        own = [m for m in cls.model_fields[name].metadata if isinstance(m, Option)]
        flag = "--" + name.replace("_", "-")
        return Option(own[0].metavar, own[0].flags or (flag,)) if own else Option(None, (flag,))

    @classmethod
    def smallest(cls) -> PackConfig:
        return cls(src=Path("source"), out=Path("shards"))

    @field_validator("split")
    @classmethod
    def _is_a_word(cls, split: str | None) -> str | None:
        if split is not None and not SAFE_SPLIT.fullmatch(SPLITS.get(split, split)):
            raise ValueError(
                f"--split {split}: use a plain lower-case word, such as train, val or test"
            )
        return split

    @field_validator("dedupe")
    @classmethod
    def _is_known(cls, dedupe: str | None) -> str | None:
        known = ("sample", *sorted(table().modalities))
        if dedupe is not None and dedupe not in known:
            raise ValueError(f"--dedupe {dedupe}: unknown{did_you_mean(dedupe, known)}")
        return dedupe

    @field_validator("limits")
    @classmethod
    def _are_settings(cls, limits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for kind, settings in limits.items():
            try:
                get_modality(kind, settings)
            except UserError as error:
                raise ValueError(str(error)) from error
        return limits

    @model_validator(mode="after")
    def _lies_outside(self) -> PackConfig:
        src, out = self.src.resolve(), self.out.resolve()
        if src in (out, *(out.parents if src.is_dir() else ())):
            raise ValueError(
                f"--out {self.out} lies in the source {self.src}; choose another folder"
            )
        return self
