"""One file per model family; `load_model` finds the folder, recognises the family and loads it."""

from __future__ import annotations

import importlib
from importlib.resources import files
from pathlib import Path

import torch

from ..errors import CheckpointError
from .family import ImageModel, NoiseTraining
from .llama import read_json

# Value of "sjd2_family" in config.json -> module of this package with a `load` function.
FAMILIES = {"scenes": "scenes"}


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
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # the hub client has many, all of them mean: not to be had
        raise CheckpointError(f"{repository!r} could not be fetched from the hub: {error}") from error


def load_model(name_or_path: str, device: torch.device, dtype: torch.dtype) -> ImageModel:
    """Load a model of any known family; raises CheckpointError for what is unknown, missing or damaged."""
    folder = find_model(name_or_path)
    family = read_json(folder / "config.json").get("sjd2_family")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'} names no known family (sjd2_family={family!r}); known: {', '.join(FAMILIES)}"
        )
    module = importlib.import_module(f".{FAMILIES[family]}", __package__)
    return module.load(folder, folder.name, device, dtype)


__all__ = ["FAMILIES", "ImageModel", "NoiseTraining", "bundled_models", "find_model", "load_model"]
