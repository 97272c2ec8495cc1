"""One file per model family; `load_model` finds the folder, recognises the family and loads it.

A family's module has two functions: `describe(folder, options) -> ModelFacts`, which reads config.json and the
checkpoint's names and shapes only, and `load(folder, name, device, dtype, options) -> ImageModel`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import CheckpointError
from .family import ImageModel, LoadOptions, ModelFacts, NoiseTraining
from .weights import read_json


def named(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """A test of config.json: whether "sjd2_family", "model_type" or an entry of "architectures" is one of these."""

    def is_one(config: Mapping[str, Any]) -> bool:
        given = [config.get("sjd2_family") or config.get("model_type"), *(config.get("architectures") or [])]
        return any(name in names for name in given)

    return is_one


def is_lumina2(config: Mapping[str, Any]) -> bool:
    """A test of config.json: Lumina-mGPT 2.0 calls itself Chameleon, and has more than twice its vocabulary."""
    larger = isinstance(size := config.get("vocab_size"), int) and size > 131_072
    return named("lumina-mgpt-2")(config) or (larger and named("chameleon")(config))


# Module -> which config.json is its own; the first that says yes has it.
FAMILIES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    ".scenes": named("scenes"),
    ".lumina2": is_lumina2,
    ".chameleon": named("chameleon", "lumina-mgpt"),
    ".llamagen": named("llamagen"),
    ".emu3": named("emu3", "Emu3"),
    ".janus": named("janus", "multi_modality"),
}


def bundled_models() -> dict[str, Path]:
    """Names and folders of the models that come with the package."""
    root = Path(str(files("sjd2_engine"))) / "weights"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/config.json"))}


def find_model(name_or_path: str) -> Path:
    """Folder of a bundled model, of a local path, or of a hub repository already or now downloaded."""
    bundled = bundled_models()
    if name_or_path in bundled:
        return bundled[name_or_path]
    path = Path(name_or_path)
    if path.is_dir():
        return path
    known = ", ".join(bundled) or "none found"
    if name_or_path.count("/") != 1 or path.is_absolute() or name_or_path.startswith("."):
        raise CheckpointError(
            f"there is no model {name_or_path!r}: expected a bundled one ({known}), a folder, or a hub id "
            "like owner/name"
        )
    return _download(name_or_path)


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{repository!r} is a hub id, which needs: pip install 'sjd2-engine[hf]'") from None
    wanted = ["*.json", "*.safetensors", "*.txt", "*.tiktoken"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # the hub client has many, all of them mean: not to be had
        raise CheckpointError(
            f"{repository!r} could not be fetched from the hub ({error}); without a network, give the path of a "
            "folder with its files"
        ) from error


def family_of(folder: Path) -> ModuleType:
    """The module of the family that a checkpoint folder belongs to; CheckpointError for unknown ones."""
    path = folder / "config.json"
    config = read_json(path)
    for module, is_own in FAMILIES.items():
        if is_own(config):
            return importlib.import_module(module, __package__)
    given = ", ".join(f"{key}={config.get(key)!r}" for key in ("sjd2_family", "model_type", "architectures"))
    known = ", ".join(name.strip(".") for name in FAMILIES)
    raise CheckpointError(f"{path} names no known family ({given}); known: {known}")


def describe_model(name_or_path: str, options: LoadOptions | None = None) -> ModelFacts:
    """What a model is, from its config.json and file headers; raises CheckpointError as `load_model` does."""
    folder = find_model(name_or_path)
    return family_of(folder).describe(folder, options or LoadOptions())


def load_model(
    name_or_path: str, device: torch.device, dtype: torch.dtype, options: LoadOptions | None = None
) -> ImageModel:
    """Load a model of any known family; raises CheckpointError for what is unknown, missing or damaged."""
    folder = find_model(name_or_path)
    # A downloaded snapshot lies in a folder named by its hash.
    name = (folder if Path(name_or_path).is_dir() else Path(name_or_path)).resolve().name
    return family_of(folder).load(folder, name, device, dtype, options or LoadOptions())


__all__ = [
    "FAMILIES",
    "ImageModel",
    "LoadOptions",
    "ModelFacts",
    "NoiseTraining",
    "bundled_models",
    "describe_model",
    "find_model",
    "load_model",
    "named",
]
