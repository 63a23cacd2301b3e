"""Tensors of a folder in Hugging Face's layout, read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import UserError
from mm.model.tensor_file import DTYPES
from mm.model.weight_files import INDEX, ONE, has_weights, open_weights
from mm.specs import NONE

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5")
NAMES = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}


class Checkpoint:
    """Tensors by name, in any number of files, of which one is in memory at a time."""

    def __init__(self, files: Mapping[str, Any], origin: Path, stored: Mapping[str, str] = NONE):
        self.files, self.origin = files, origin
        self.stored = stored  # name in the file, where it is another one

    def by_names(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors by other names."""
        names = {rename(name): name for name in self.files}
        if len(names) < len(self.files):
            raise UserError(f"{self.origin}: holds tensors twice, by an old name and a new one")
        return Checkpoint({new: self.files[old] for new, old in names.items()}, self.origin, names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(self._stored(name)).get_shape())

    def _stored(self, name: str) -> str:
        return self.stored.get(name, name)

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError on a tensor of whole numbers or of eight bits."""
        word = self.files[name].get_slice(self._stored(name)).get_dtype()
        if word not in NAMES:
            raise UserError(
                f"{self.origin}: {name} holds {word}, quantised weights; take the model before it "
                "was quantised"
            )
        return NAMES[word]

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(self._stored(name))


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """The tensors of a folder in Hugging Face's layout.

    Raises UserError naming the file: none is there, pickles alone, an index that lies, a header
    that does.
    """
    if not has_weights(folder):
        found = [name for name in PICKLES if (folder / name).exists()]
        if found:
            raise UserError(
                f"{folder / found[0]}: a pickle can run code and is not opened; write it as "
                'safetensors with: python -c "from transformers import AutoModelForCausalLM as A; '
                f"A.from_pretrained('{folder}').save_pretrained('OUT')\""
            )
        raise UserError(f"{folder}: holds no weights ({ONE} or {INDEX}); copy the folder again")
    with ExitStack() as stack:
        yield Checkpoint(open_weights(folder, stack.enter_context).files, folder)
