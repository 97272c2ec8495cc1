"""Our logits against expected ones: whole sequences, then windows over a cache, with entries rolled back."""

from __future__ import annotations

import torch
from torch import Tensor

from sjd2_engine.cache import StaticCache
from sjd2_engine.models import ImageModel


def assert_logits_match(model: ImageModel, embeds: Tensor, expected: Tensor) -> None:
    """embeds [3, 40, D], expected [3, 40, V] in float32: at most 1e-5 of the largest logit apart.

    Prompts of different lengths stand in one batch; behind them, windows of which some entries are wrong and
    overwritten by the next window.
    """
    core, generator = model.transformer, torch.Generator().manual_seed(3)
    bound = 1e-5 * float(expected.abs().max())
    cache = StaticCache(core.config, 3, 48, 0, embeds.device, embeds.dtype)
    whole = core.head(cache.forward(core, embeds))
    assert float((whole - expected).abs().max()) <= bound
    lengths = torch.tensor([5, 9, 12], dtype=torch.int32)
    cache.forward(core, embeds[:, :12])
    while int(lengths.min()) < 34:
        cache.lengths.copy_(lengths)
        good = torch.randint(1, 6, (3,), generator=generator)
        places = (lengths[:, None] + torch.arange(6)).clamp(max=39)
        window = embeds.gather(1, places[..., None].expand(-1, -1, embeds.shape[2])).clone()
        for row, keep in enumerate(good.tolist()):
            window[row, keep:] = torch.randn(6 - keep, embeds.shape[2], generator=generator)
        logits = core.head(cache.forward(core, window))
        for row, (length, keep) in enumerate(zip(lengths.tolist(), good.tolist(), strict=True)):
            assert float((logits[row, :keep] - expected[row, length : length + keep]).abs().max()) <= bound
        lengths = (lengths + good.int()).clamp(max=34)
