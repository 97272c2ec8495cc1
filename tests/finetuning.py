"""Tiny runs of noise training, shared by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_chameleon
import tiny_emu3
import tiny_janus
import tiny_llamagen
import torch
from torch import Tensor

from sjd2_engine.models import ImageModel, load_model
from sjd2_engine.models.family import LoadOptions
from sjd2_engine.training.finetune import Finetune, make_accelerator
from sjd2_engine.training.options import Options
from sjd2_engine.training.store import DatasetInfo, ShardWriter

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "levels": (3,), "t_min": 0.5, "segment": (1, 2), "clean_run": (0, 3), "unconditional": 0.2, "batch": 4,
    "micro_batch": 4, "steps": 12, "warmup": 1, "rate": 2e-3, "validation": 3, "precision": "float32", "log_every": 1,
    "checkpointing": False,
}  # fmt: skip


def write_checkpoint(kind: str, folder: Path) -> Path:
    """A tiny random checkpoint in a real format."""
    family, _, variant = kind.partition("-")
    if family == "chameleon":
        return tiny_chameleon.write_hf(folder, tiny_chameleon.hf_model(), decoder_inside=True)
    if family == "lumina":
        return tiny_chameleon.write_lumina(folder, tiny_chameleon.hf_model(kv_heads=4, shared_norms=2), 2)
    if family == "emu3":
        model = tiny_emu3.hf_model(hf_names=variant != "released")
        return (
            tiny_emu3.write_released(folder, model) if variant else tiny_emu3.write_hf(folder, model, old_names=False)
        )
    if family == "janus":
        model = tiny_janus.hf_model(pro=True, kv_heads=2)
        if variant:
            return tiny_janus.write_released(folder, model, pro=True, pickled=True)
        return tiny_janus.write_hf(folder, model)
    return tiny_llamagen.write(folder, variant)


TEXTS = {"llamagen-c2i": ("3", "5"), "llamagen-t2i": ("a red fox", "an owl at night in the fog")}


def texts_of(kind: str) -> tuple[str, str]:
    """Two prompts of different lengths, where the family has such."""
    return TEXTS.get(kind, ("a red fox", "a fox in the red fog"))


def options_of(kind: str) -> LoadOptions:
    return LoadOptions({"emu3": (24, 48), "lumina": (32, 64)}.get(kind.split("-")[0]), allow_pickle=True)


def load(kind: str, folder: Path) -> ImageModel:
    return load_model(str(folder), CPU, torch.float32, options_of(kind))


class Random:
    """Random pictures of a model with captions."""

    def __init__(self, model: ImageModel, texts: tuple[str, ...], count: int = 12) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (count, model.layout.image_count)
        self.tokens = torch.randint(model.transformer.image_vocabulary, shape, generator=generator)
        self.texts = texts

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.tokens[index], self.texts[index % len(self.texts)]


def write_store(model: ImageModel, folder: Path, texts: tuple[str, ...], count: int = 12) -> Path:
    """The same pictures as prepared data."""
    with ShardWriter(folder, DatasetInfo.of(model, 5)) as writer:
        for index, (tokens, caption) in enumerate(Random(model, texts, count)):  # type: ignore[arg-type]
            writer.add(str(index), tokens, caption)
        writer.finish()
    return folder


def losses(out: Path) -> list[float]:
    """What the steps of a run have logged."""
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def make_run(kind: str, folder: Path, out: Path, **changes: Any) -> Finetune:
    """A run on the CPU over random pictures."""
    model = load(kind, folder)
    options = Options.build("", **{**SMALL, **changes})
    accelerator = make_accelerator(options, out, "cpu")
    return Finetune(model, folder, Random(model, texts_of(kind)), out, options, accelerator)
