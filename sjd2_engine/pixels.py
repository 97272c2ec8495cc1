"""Image tokens to pixels, beside the decoding loop."""

from __future__ import annotations

import torch
from torch import Tensor

from .graphs import Lagged, StepGraphs, stream_for
from .models import ImageModel


class Pixels:
    """Draws pictures one at a time: on CUDA as a graph of its own, on a stream of its own."""

    def __init__(self, model: ImageModel) -> None:
        self.model = model
        device = model.transformer.embedding.device
        self._stream = stream_for("pixels", device) if device.type == "cuda" else None
        self.graphs = StepGraphs(device, work="pixels")
        self._tokens = torch.zeros(1, model.layout.image_count, dtype=torch.int64, device=device)
        self._drawn: Tensor | None = None

    @torch.inference_mode()
    def start(self, tokens: Tensor) -> Lagged:
        """Begin with a slot's image tokens i64 [n]; pops as uint8 [H, W, 3]."""
        arriving = Lagged()
        if self._stream is None:
            self._draw_into(arriving, tokens)
            return arriving
        self._stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(self._stream):
            self._draw_into(arriving, tokens)
        tokens.record_stream(self._stream)
        return arriving

    def _draw_into(self, arriving: Lagged, tokens: Tensor) -> None:
        self._tokens.copy_(tokens[None])
        # One at a time: convolutions round differently for other batch sizes, and pictures must not depend on it.
        self.graphs.run("picture", self._draw)
        assert self._drawn is not None
        arriving.push(self._drawn)

    def _draw(self) -> None:
        self._drawn = self.model.decode_pixels(self._tokens)[0]
