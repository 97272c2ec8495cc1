"""What differs between releases of one model: names of tensors and tokens, and sizes that config.json leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .weights import Checkpoint


class Renamed(Checkpoint):
    """A checkpoint whose tensors go by the names that `rename` gives them; messages keep the stored ones."""

    def __init__(self, path: Path, rename: Callable[[str], str], allow_pickle: bool = False) -> None:
        super().__init__(path, allow_pickle)
        self._stored = {rename(name): name for name in super().names()}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> list[str]:
        return list(self._stored)

    def file_of(self, name: str) -> Path:
        return super().file_of(self._stored.get(name, name))

    def shape(self, name: str) -> tuple[int, ...]:
        return super().shape(self._stored.get(name, name))

    def stored_name(self, name: str) -> str:
        return self._stored.get(name, name)

    def read(self, name: str) -> Tensor:
        return super().read(self._stored.get(name, name))


def token_ids(vocabulary: Mapping[str, int], names: Mapping[str, str], path: Path) -> dict[str, int]:
    """Ids of the tokens that `names` spells, under the same keys; CheckpointError if `path` lacks one."""
    missing = [name for name in names.values() if name not in vocabulary]
    if missing:
        raise CheckpointError(f"{path}: the vocabulary has no token {missing[0]!r}, which pictures of this family need")
    return {key: vocabulary[name] for key, name in names.items()}


def sizes_of(config: Mapping[str, Any], released: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The entries of `released`, each as in `config` where it is there; CheckpointError for values of other types."""
    sizes = {name: default if config.get(name) is None else config[name] for name, default in released.items()}
    for name, default in released.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(sizes[name], kinds):
            raise CheckpointError(f"{path}: {name} is {sizes[name]!r}, expected {type(default).__name__}")
    return sizes
