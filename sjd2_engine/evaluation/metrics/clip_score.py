"""CLIP score: 100 · max(0, cosine) of a picture and its prompt in a CLIP model (Hessel et al., arXiv 2104.08718).

By transformers itself: the CLIPScore of torchmetrics 1.9 fails on transformers 5, and knows a few hub ids only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import BackendError, CheckpointError, ConfigError
from ..intervals import bootstrap
from ..prompts import Case
from .base import Finding, MetricResult, Picture, Progress, score_each


class ClipScore:
    """CLIP scores by a model in transformers' format, which brings its own preprocessing; f32 throughout."""

    name = "clip"

    def __init__(self, device: torch.device, model: str | None) -> None:
        if model is None:
            raise ConfigError(
                "the CLIP score needs a CLIP model: --clip with a folder or hub id in transformers' format, such as "
                "openai/clip-vit-large-patch14"
            )
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise BackendError("the CLIP score needs transformers: pip install 'sjd2-engine[eval,hf]'") from error
        try:
            loaded: Any = CLIPModel.from_pretrained(model, dtype=torch.float32)
            self._processor: Any = CLIPProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise CheckpointError(
                f"no CLIP model at '{model}' ({said}); expected a folder with config.json, model.safetensors, "
                "preprocessor_config.json and a tokenizer, or a hub id that can be reached"
            ) from error
        self._model, self._device, self._name = loaded.to(device).eval(), device, model

    @property
    def settings(self) -> dict[str, Any]:
        """The model, as given."""
        return {"clip": self._name}

    def check(self, cases: Sequence[Case], family: str) -> None:
        """Any prompt and any model will do."""

    def score(self, pictures: Sequence[Picture], out: Path, progress: Progress) -> MetricResult:
        """Score every picture; scores are kept in `clip.jsonl`."""
        records = score_each(pictures, out / "clip.jsonl", self._scores, progress)
        mean = bootstrap([record["clip"] for record in records])
        values = {"mean": mean.value, "low": mean.low, "high": mean.high, "pictures": len(records), **self.settings}
        finding = Finding("CLIP score", str(len(records)), f"{mean.value:.2f}", f"{mean.low:.2f} – {mean.high:.2f}")
        longest = self._model.config.text_config.max_position_embeddings
        note = f"CLIP score: by {self._name}, prompts cut at {longest} tokens, interval by bootstrap over pictures"
        return MetricResult(values, [finding], [note])

    @torch.inference_mode()
    def _scores(self, pictures: Sequence[Picture]) -> Iterable[dict[str, Any]]:
        inputs = self._processor(
            text=[picture.case.text for picture in pictures],
            images=[picture.open() for picture in pictures],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        ).to(self._device)
        found = self._model(**inputs)
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return [{"clip": 100 * max(0.0, cosine)} for cosine in cosines.tolist()]
