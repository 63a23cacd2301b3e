"""What networks of trained tokenizers share: the folder that they save is a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from mm.batch import Sum
from mm.config import Config, validate
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.reading import parse_json
from mm.registry import NETWORKS, TOKENIZERS
from mm.tokenizers.load import fingerprint_of, write_folder
from mm.tokenizers.quantizers.base import Quantizer

NONE: Mapping[str, Any] = {}


class TokenizerNetwork(nn.Module):
    """A network with a ``config`` (that has a ``modality``) and a ``quantizer``.

    ``kind`` is its name in both tables.
    """

    kind: ClassVar[str]
    config: Any
    quantizer: Quantizer

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        """Move codebooks by globally summed statistics."""
        self.quantizer.after_step(stats)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        vocabulary: Any = None,
        tokenizers: Mapping[str, Path] = NONE,
        card: Config | None = None,
    ) -> str:
        """Write config.json, model.safetensors and tokenizer.yaml: the folder is a tokenizer.

        Args:
            folder: made when missing.
            vocabulary: not used; every network of the trainer is offered one.
            tokenizers: not used.
            card: the tokenizer's config; default one of this network's modality.
        Returns:
            The tokenizer's fingerprint.
        """
        return write_folder(folder, card or self._card(), self._files(), self._tensors())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises UserError when a file is missing, damaged or does not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            values = parse_json((folder / "config.json").read_bytes())
            net = validate(NETWORKS.get(cls.kind), values, str(folder / "config.json")).build()
            init_weights(net)  # tables that are not saved
            net.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            what = " ".join(str(error).split())[:300]
            raise UserError(
                f"{folder}: no usable {cls.kind} network ({what}); train one with: "
                "mm tokenizer train CONFIG"
            ) from error
        return net.eval()

    def fingerprint(self, card: Config | None = None) -> str:
        """Of the tokenizer that ``card`` and these weights make.

        Equal to that of the saved folder.
        """
        return fingerprint_of(card or self._card(), self._files(), self._tensors())

    def _card(self) -> Config:
        return TOKENIZERS.get(self.kind)(modality=self.config.modality)  # type: ignore[call-arg]

    def _files(self) -> dict[str, bytes]:
        return {"config.json": json.dumps(self.config.to_dict(), indent=1).encode()}

    def _tensors(self) -> dict[str, Tensor]:
        """Weights in fp32 whatever the engine's precision was: a loaded one has the same print."""
        return {k: t.float() if t.is_floating_point() else t for k, t in self.state_dict().items()}
