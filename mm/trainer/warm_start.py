"""`init_from`: networks that begin with the weights of a saved model or of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mm import config as configs
from mm.config import Config, validate
from mm.errors import UserError
from mm.hashes import digest
from mm.init_from import InitFrom
from mm.model.folder import load_tensors, open_tensors, read_config
from mm.model.model import LmConfig
from mm.model.slices import Lazy, shapes_of
from mm.model.weight_files import ONE as WEIGHTS
from mm.model.weight_files import digest_weights, has_weights
from mm.registry import NETWORKS
from mm.run import Run
from mm.surgery.base import Operated
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.fit_weights import fit_weights, for_linears, refusal, rows_of
from mm.vocabulary import Vocabulary

WORDS, TOKENIZERS = "vocabulary.json", "tokenizers"
ADAPTERS = "adapters.safetensors"
PEFT_CONFIG, PEFT_ADAPTERS = "adapter_config.json", "adapter_model.safetensors"


def resolve(run: Run) -> Run:
    """The run with the vocabulary and tokenizers of what it begins from, where it names none.

    A run that was begun has them in its own config.yaml: what it began from is not read again.

    Raises:
        UserError: it is this run's own folder, or nothing is saved there.
    """
    if run.init_from is None:
        return run
    own, given = run.folder.resolve(), run.init_from.path.resolve()
    if own in (given, *given.parents):
        raise UserError(
            f"init_from: {run.init_from.path} is the folder of this run itself; to go on with it "
            "leave init_from out, to begin a new one give it another name: name=..."
        )
    written = run.folder / "config.yaml"
    if written.is_file():
        values = configs.read(written)
        vocabulary = values.get("vocabulary")
        words = Path(vocabulary) if vocabulary else None
        tokenizers = {m: Path(path) for m, path in (values.get("tokenizers") or {}).items()}
    else:
        folder = saved_model("init_from", run.init_from.path)
        words = folder / WORDS if (folder / WORDS).is_file() else None
        beside = sorted((folder / TOKENIZERS).glob("*"))
        tokenizers = {path.name: path for path in beside if path.is_dir()}
    words = run.vocabulary or words
    return run.model_copy(
        update={"vocabulary": words, "tokenizers": {**tokenizers, **run.tokenizers}}
    )


def saved_model(key: str, path: Path) -> Path:
    """The saved model at ``path``, or that of the run there. Raises UserError naming ``key``."""
    for folder in (path / "model", path):
        if has_weights(folder):
            return folder
    trained = (path / "checkpoints").is_dir()
    why = "its training has not ended: mm train it to its end" if trained else "name a run folder"
    raise UserError(f"{key}: {path} holds no saved model ({WEIGHTS}); {why}")


def saved_config(key: str, asked: InitFrom) -> Config:
    """The config of a saved network, whose files are compared with their hashes.

    Raises UserError naming ``key``.
    """
    if asked.network != "model":
        raise UserError(
            f"{key}: only a saved model brings its config; '{asked.network}' of {asked.path} needs "
            "one here"
        )
    folder = saved_model(key, asked.path)
    values = read_config(folder)
    return validate(NETWORKS.get(str(values.get("kind"))), values, str(folder / "config.json"))


def config_at_start(key: str, asked: InitFrom) -> Config:
    """`saved_config` after the operations of ``asked``. Raises UserError naming ``key``."""
    config = saved_config(key, asked)
    if not asked.surgery:
        return config
    folder = saved_model(key, asked.path)
    old = Vocabulary.load(folder / WORDS) if (folder / WORDS).is_file() else None
    it = Operated(config, open_tensors(folder), old)
    return operate(key, asked, it, old).config


class WarmStart(Snapshot):
    """Trained weights as what a network begins with.

    Attributes:
        facts: folder, step and hash of what they come from.
        told: that, and what became of every tensor (`Fitted`), once they were fitted.

    Args:
        key: that names them, for messages.
        asked: where they are, and what need not fit.
        vocabulary: of the run.
        name: of the network.
        exact: whether the vocabulary must be the very one that they were trained with.
        words: path of the run's vocabulary, for messages.
    Raises:
        UserError: nothing is saved there, or the vocabularies do not fit.
    """

    def __init__(
        self,
        key: str,
        asked: InitFrom,
        vocabulary: Vocabulary | None,
        *,
        name: str = "model",
        exact: bool = False,
        words: Path | None = None,
    ):
        self.key, self.asked = key, asked
        self.rows: list[tuple[slice, slice]] | None = None
        self.sizes = (0, 0)
        self.told: dict[str, Any] = {}
        if asked.network == "model":
            folder = saved_model(key, asked.path)
            step = _step(folder.parent)
            tensors, sha256 = open_tensors(folder), digest_weights(folder)
        else:
            saved = checkpoint.newest(asked.path / "checkpoints")
            if saved is None or not saved.has(asked.network):
                raise UserError(f"{key}: no checkpoint of {asked.path} has '{asked.network}'")
            folder, step = saved.folder, saved.state["step"]
            tensors, sha256 = saved.tensors(asked.network), saved.sha256(asked.network)
        old = Vocabulary.load(folder / WORDS) if (folder / WORDS).is_file() else None
        self.adapted: LmConfig | None = None
        if asked.adapters is not None and (asked.adapters / PEFT_CONFIG).is_file():
            self.adapted, whole = _put_adapter(key, asked, tensors, old)
            tensors = Lazy(shapes_of(whole), whole.__getitem__)
        elif asked.adapters is not None:
            tensors = tensors.with_tensors(load_tensors(_adapters(key, asked.adapters)))
        self.operated: Config | None = None
        if asked.surgery:
            begun = self.adapted or saved_config(key, asked)
            it = Operated(begun, tensors, old)
            self.operated, operated, old = operate(key, asked, it, vocabulary)
            super().__init__({"stage": -1}, {name: operated})
        else:
            super().__init__({"stage": -1}, {name: tensors})
        self.origin = str(folder)
        self.facts: dict[str, Any] = {"folder": str(folder), "step": step, "sha256": sha256}
        if asked.adapters is not None:
            found = _adapters(key, asked.adapters)
            self.facts |= {"adapters": str(found), "adapters_sha256": digest(found)}
        if vocabulary is not None and old is not None:
            self._compare(old, vocabulary, words, exact)

    def _compare(self, old: Vocabulary, new: Vocabulary, words: Path | None, exact: bool) -> None:
        """Find which rows of ids are taken; raises UserError."""
        named = f"{self.key}: the vocabulary{f' {words}' if words else ''}"
        if exact and old != new:
            raise UserError(
                f"{named} is not that of {self.origin} ({', '.join(old.modalities)}), so its ids "
                f"would mean something else: set vocabulary={self.asked.path / WORDS}"
            )
        try:
            self.rows = rows_of(old, new, self.asked.vocabulary)
        except ValueError:
            raise UserError(
                f"{named} does not begin with that of {self.origin} "
                f"({', '.join(old.modalities)}), so its ids would mean something else; pack the "
                "data with: mm data pack SRC --out DIR --tokenizers ... --vocabulary "
                f"{Path(self.origin) / WORDS}, or take what both have: "
                f"{self.key}.vocabulary=matched"
            ) from None
        self.sizes = (old.size, new.size)
        known = [spec for spec in old.ranges if spec in new.ranges]
        self.new_modalities = [s.modality for s in new.ranges if s not in known]

    def fit(self, module: nn.Module, weights: Mapping[str, Tensor]) -> Lazy:
        """The weights as ``module`` takes them, `Rows` of some; `told` says what begins fresh.

        Raises UserError naming what does not fit.
        """
        if self.adapted is not None and not self.asked.surgery:
            _require_linear(self.key, self.asked, self.adapted, module)
        weights = for_linears(module, weights)
        out, told, faults = fit_weights(module, weights, self.asked, self.rows, self.sizes)
        if faults:
            why = refusal(self.key, faults, module, weights)
            raise UserError(f"{self.key}: {self.origin} does not fit: {why}{self._made(module)}")
        self.told = self.facts | told.to_dict()
        return out

    def _made(self, module: nn.Module) -> str:
        """What the operations made of the model's config, where it is another than this one."""
        own = getattr(module, "config", None)
        if self.operated is None or not isinstance(own, Config):
            return ""
        found = checkpoint.differences(own.to_dict(), self.operated.to_dict())
        told = [f"{name} is {new} (here {old})" for name, (old, new) in found.items()]
        return f"; after the surgery {', '.join(told[:8])}" if told else ""


def operate(key: str, asked: InitFrom, it: Operated, vocabulary: Vocabulary | None) -> Operated:
    """The network after the operations of ``asked``. Raises UserError naming ``key``."""
    for number, surgery in enumerate(asked.surgery):
        try:
            it = surgery.apply(it, vocabulary)
        except UserError as error:
            raise UserError(f"{key}.surgery.{number}: {error}") from error
    return it


def begin(
    run: Run, vocabulary: Vocabulary | None, saved: Snapshot | None
) -> tuple[Snapshot | None, dict[str, Any] | None]:
    """What a run begins with, and what is written of it: its checkpoint, else ``init_from``."""
    if saved is not None:
        return saved, saved.state.get("init_from")
    if run.init_from is None:
        return None, None
    warm = WarmStart("init_from", run.init_from, vocabulary, words=run.vocabulary)
    return warm, warm.facts


def _adapters(key: str, path: Path) -> Path:
    """The file of adapters at ``path``, or in the run there. Raises UserError naming ``key``."""
    for file in (path / ADAPTERS, path / PEFT_ADAPTERS, path):
        if file.is_file():
            return file
    raise UserError(
        f"{key}.adapters: {path} has no {ADAPTERS}; name a run of model.linear: lora, or a folder "
        f"that PEFT wrote ({PEFT_CONFIG})"
    )


def _put_adapter(
    key: str, asked: InitFrom, tensors: Mapping[str, Tensor], vocabulary: Vocabulary | None
) -> tuple[LmConfig, dict[str, Tensor]]:
    """The base with an adapter in PEFT's format upon it. Raises UserError naming ``key``."""
    from mm.interchange.adapter import put_adapter  # all families, which few runs need

    lm, folder = saved_config(key, asked), asked.adapters
    assert folder is not None
    if not isinstance(lm, LmConfig) or vocabulary is None:
        raise UserError(f"{key}.adapters: {asked.path} is no language model, which {folder} is for")
    try:
        return put_adapter(folder, lm, tensors, vocabulary, asked.path)
    except UserError as error:
        raise UserError(f"{key}.adapters: {error}") from error


def _require_linear(key: str, asked: InitFrom, adapted: LmConfig, module: nn.Module) -> None:
    """Refuse a model whose adapters compute something else. Raises UserError naming ``key``."""
    need: Any = adapted.linear
    own: Any = getattr(getattr(module, "config", None), "linear", None)
    scale = lambda c: c.alpha / (c.rank**0.5 if c.rs else c.rank)
    alike = getattr(own, "kind", "") == "lora" and (own.rank, own.dora) == (need.rank, need.dora)
    if not alike or abs(scale(own) / scale(need) - 1) > 1e-6:
        names = ", ".join(need.targets)
        raise UserError(
            f"{key}.adapters: {asked.adapters} needs model.linear={{kind: lora, rank: {need.rank}, "
            f"alpha: {need.alpha:g}, rs: {str(need.rs).lower()}, dora: {str(need.dora).lower()}, "
            f"targets: [{names}]}}"
        )


def _step(run: Path) -> int | None:
    """The step of a run's saved model; None where nothing says it."""
    mark = run / "model.step"  # the step, and `best` where that was exported
    return int(mark.read_text().split()[0]) if mark.is_file() else None
