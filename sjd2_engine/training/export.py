"""Writes models: the bundled family from scratch, and a checkpoint of any family with trained weights in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..files import replace_file
from ..models.emu3_vq import BESIDE, INSIDE
from ..models.llama import save_llama
from ..models.scenes_vq import SceneVQ
from ..models.weights import Checkpoint, Origin, Rows
from ..scenes.world import WORDS
from ..transformer import Transformer

STORED = torch.float16  # 11 bits of mantissa: the loss does not notice, and two models fit into the package
LINK_ABOVE = 2**24  # bytes; smaller files are copied, so that editing one does not change the original
NOT_COPIED = ("sjd2.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", ".git", ".cache")
INDEX = "model.safetensors.index.json"


def save_scenes(model: Transformer, vq: SceneVQ, out: Path) -> None:
    """config.json, model.safetensors (Llama format) and vq.safetensors of fresh weights of the bundled family."""
    save_llama(model, out, {"sjd2_family": "scenes", "words": list(WORDS)}, STORED)
    tensors = {name: tensor.to(STORED).contiguous() for name, tensor in vq.state_dict().items()}
    save_file(tensors, out / "vq.safetensors")


def writable(origin: Origin) -> set[str]:
    """Parameters of the core that can be written back exactly.

    Left out are those that were computed from other tensors, and those that share stored numbers with each other or
    within themselves (tied tables, norms stored once for several heads): trained apart, they would no longer fit.
    """
    uses: dict[str, list[tuple[str, Tensor | None]]] = {}
    for name, parts in origin.sources.items():
        for part in parts:
            if isinstance(part, Rows):
                uses.setdefault(part.name, []).append((name, part.rows))
    kept = {name for name, parts in origin.sources.items() if all(isinstance(part, Rows) for part in parts)}
    for users in uses.values():
        shared = len(users) > 1 or any(rows is not None and len(rows.unique()) < len(rows) for _, rows in users)
        if shared:
            kept -= {name for name, _ in users}
    return kept


def write_model(
    folder: Path, out: Path, origin: Origin, trained: Mapping[str, Callable[[], Tensor]], noise: Mapping[str, Any]
) -> None:
    """The checkpoint of `folder` in `out`, with `trained` parameters of the core in it and sjd2.json beside it.

    Files, names, shapes and types of the tensors are the original ones; pickled weights become safetensors. Files
    that are not weights of the core are copied, large ones linked where the disk allows. `trained` gives each
    parameter when it is needed, one at a time. config.json is written last: until then nobody takes the folder for a
    model. Raises ConfigError where there is no room.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
        rewritten = _write_weights(out, origin, trained)
        _copy_others(folder, out, {*rewritten, "config.json"})
        beside = folder.resolve().parent / BESIDE
        if beside.is_dir() and not (folder / INSIDE).exists() and out.resolve().parent != beside.parent:
            (out / INSIDE).mkdir(exist_ok=True)
            _copy_others(beside, out / INSIDE, set())
        replace_file(out / "sjd2.json", json.dumps(noise, indent=1) + "\n")
        replace_file(out / "config.json", (folder / "config.json").read_bytes())
    except Exception as error:
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise ConfigError(
                f"the model could not be written to '{out}' ({error}); make room and run the same command again: the "
                "training is kept and only the writing is repeated"
            ) from error
        raise


def _write_weights(out: Path, origin: Origin, trained: Mapping[str, Callable[[], Tensor]]) -> set[str]:
    """Every file that holds tensors of the core, anew; returns the names of the originals."""
    checkpoint = origin.checkpoint
    places = _places(origin, trained)
    by_file: dict[Path, list[str]] = {}
    for name in checkpoint.names():
        by_file.setdefault(checkpoint.file_of(name), []).append(name)
    weight_map: dict[str, str] = {}
    pickled = [file for file in by_file if file.suffix != ".safetensors"]
    for number, (file, names) in enumerate(sorted(by_file.items()), 1):
        plain = "model.safetensors" if len(by_file) == 1 else f"model-{number:05d}-of-{len(by_file):05d}.safetensors"
        target = out / (plain if file in pickled else file.name)
        tensors = {checkpoint.stored_name(name): _with(checkpoint, name, places, trained) for name in names}
        temporary = target.with_name(f".{target.name}.tmp")
        save_file(tensors, temporary, metadata=_metadata(file))
        os.replace(temporary, target)
        weight_map |= dict.fromkeys(tensors, target.name)
        del tensors
    if len(by_file) > 1:
        size = sum((out / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        replace_file(out / INDEX, json.dumps(index, indent=1) + "\n")
    return {file.name for file in by_file}


def _places(origin: Origin, trained: Iterable[str]) -> dict[str, list[tuple[str, int, Tensor | None]]]:
    """Stored tensor -> the trained parameters that hold its rows: name, first row there, rows of the stored tensor."""
    places: dict[str, list[tuple[str, int, Tensor | None]]] = {}
    for name in trained:
        start = 0
        for part in origin.sources[name]:
            if not isinstance(part, Rows):
                start += len(part)
                continue
            places.setdefault(part.name, []).append((name, start, part.rows))
            start += len(part.rows) if part.rows is not None else origin.checkpoint.shape(part.name)[0]
    return places


def _with(
    checkpoint: Checkpoint,
    name: str,
    places: Mapping[str, list[tuple[str, int, Tensor | None]]],
    trained: Mapping[str, Callable[[], Tensor]],
) -> Tensor:
    """A stored tensor with its trained rows, in its own type."""
    stored = checkpoint.read(name).clone().contiguous()
    for parameter, start, rows in places.get(name, ()):
        value = trained[parameter]().detach().cpu()
        chosen = slice(None) if rows is None else rows
        count = len(stored) if rows is None else len(rows)
        stored[chosen] = value[start : start + count].to(stored.dtype)
    return stored


def _metadata(file: Path) -> dict[str, str]:
    if file.suffix != ".safetensors":
        return {"format": "pt"}
    with safe_open(file, framework="pt") as stored:
        return stored.metadata() or {"format": "pt"}


def _copy_others(folder: Path, out: Path, done: set[str]) -> None:
    for source in sorted(folder.iterdir()):
        target = out / source.name
        if (
            source.name in done
            or source.name in NOT_COPIED
            or source.name == "run"
            or source.resolve() == out.resolve()
        ):
            continue
        if source.is_dir():
            target.mkdir(exist_ok=True)
            _copy_others(source, target, set())
        elif not target.exists() or not source.samefile(target):
            _copy(source.resolve(), target)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        if source.stat().st_size < LINK_ABOVE:
            raise OSError
        os.link(source, temporary)
    except OSError:  # small, or another disk
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
