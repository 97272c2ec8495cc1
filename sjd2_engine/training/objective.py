"""Next-clean-token prediction as one module: a batch in, its loss out, for whatever wraps modules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sjd2_kernels  # noqa: F401  (registers torch.ops.sjd2)

from ..errors import PromptError
from ..models import ImageModel
from ..schedule import CLEAN, embedding_statistics, timestep_encodings
from .attention import timestep_attention
from .batches import Batch

LOGITS_AT_ONCE = 2**25  # numbers; more are computed piece by piece and again in the backward pass
MULTIPLE = 8  # inputs are padded to a multiple of this many, so that few shapes occur


@dataclass
class Losses:
    """`mean`: cross-entropy in nats per free token. `sums`, `counts` f32 [K+1] by level of the input, clean first."""

    mean: Tensor
    sums: Tensor
    counts: Tensor


def recompute_activations(blocks: nn.ModuleList) -> None:
    """Keep the inputs of every block only, and run it again in the backward pass."""
    for block in blocks:
        # Not a wrapper module: names of parameters stay as they are.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Objective(nn.Module):
    """The transformer of a model with the loss of noise training on top.

    Inputs are the timestep tokens, the prompt, and the picture with its inputs noised in the normalised embedding
    space; each noisy input also sees its level's timestep token. Prompts count as given: no gradient reaches the text
    rows of the table through them.
    """

    times: Tensor

    def __init__(self, model: ImageModel, times: Tensor, compiled: bool = False) -> None:
        super().__init__()
        self.core = model.transformer
        self._prompts = [model]  # in a list: the model is not a part of this module, its transformer is
        self.layout = model.layout
        self.register_buffer("times", times, persistent=False)
        self._free = [i for i, local in enumerate(model.layout.forced) if local < 0]
        # In evaluation a pass is too seldom to be worth compiling again without gradients.
        self._fast_losses = torch.compile(self._token_losses, dynamic=True) if compiled else self._token_losses

    def forward(self, batch: Batch) -> Losses:
        tokens, levels = batch.tokens, batch.levels
        with torch.no_grad():
            prompts, offsets = self._prompt_rows(batch)
            mean, std = embedding_statistics(self.core.embedding, self.core.image_vocabulary)
            steps = timestep_encodings(self.times, mean, std)
        clean = F.embedding(tokens[:, :-1], self.core.embedding)
        places = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
        noisy = torch.ops.sjd2.perturb(clean, levels.int(), places, batch.seeds, mean, std, self.times, 0, True)
        embeds, positions, inner, where = self._assembled(prompts, offsets, steps.to(noisy.dtype), noisy, levels)
        free = torch.tensor(self._free, device=tokens.device)
        losses = self._fast_losses if self.training else self._token_losses
        loss = losses(embeds, positions, inner, where[:, free], tokens[:, free])
        given = F.pad(levels, (1, 0), value=CLEAN)[:, free] + 1
        kinds = len(self.times) + 1
        with torch.no_grad():
            flat = loss.detach().flatten().float()
            sums = flat.new_zeros(kinds).index_add_(0, given.flatten(), flat)
            counts = torch.bincount(given.flatten(), minlength=kinds).float()
        return Losses(loss.mean(), sums, counts)

    def _prompt_rows(self, batch: Batch) -> tuple[list[Tensor], list[int]]:
        """Embeddings [P, D] in front of every picture, and the rotary position of the first of them."""
        (model,) = self._prompts
        rows = []
        for text, dropped in zip(batch.captions, batch.dropped):
            row = model.unconditional_embeds(text, "") if dropped else model.prompt_embeds(text)
            most = self.core.cos.shape[0] - len(self.layout) - model.position_offset(len(row))
            if len(row) > most:
                raise PromptError(
                    f"the caption {text[:60]!r} has {len(row)} tokens, the model has {most} positions for it; "
                    "shorten it"
                )
            rows.append(row)
        return rows, [model.position_offset(len(row)) for row in rows]

    def _assembled(
        self, prompts: list[Tensor], offsets: list[int], steps: Tensor, noisy: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [B, K+T, D] padded on the right, rotary positions [B, K+T], levels [B, T], and for every position of
        the picture the place [B, N] of the output that predicts it."""
        longest = max(map(len, prompts)) + noisy.shape[1]
        total = longest + -longest % MULTIPLE
        device = noisy.device
        rows, inner = [], []
        for prompt, image, level in zip(prompts, noisy, levels):
            behind = total - len(prompt) - len(image)
            rows.append(torch.cat([steps, prompt.to(image.dtype), F.pad(image, (0, 0, 0, behind))]))
            inner.append(F.pad(level, (len(prompt), behind), value=CLEAN))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        tail = torch.arange(total, device=device) + torch.tensor(offsets, device=device)[:, None]
        positions = F.pad(tail, (len(steps), 0)).clamp(max=self.core.cos.shape[0] - 1)
        where = len(steps) + lengths[:, None] - 1 + torch.arange(len(self.layout), device=device)
        return torch.stack(rows), positions, torch.stack(inner), where

    def _token_losses(self, embeds: Tensor, positions: Tensor, levels: Tensor, where: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy [B, n] of the free positions."""
        steps = len(self.times)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return timestep_attention(q.to(v.dtype), k.to(v.dtype), v, levels, steps)

        hidden = self.core(embeds, positions, attend)
        hidden = hidden.gather(1, where[:, :, None].expand(-1, -1, hidden.shape[2]))
        pieces = -(-target.numel() * self.core.image_vocabulary // LOGITS_AT_ONCE)
        if pieces <= 1:
            return self._head_loss(hidden, target)
        parts = zip(hidden.chunk(pieces, 1), target.chunk(pieces, 1))
        losses = [checkpoint(self._head_loss, *part, use_reentrant=False) for part in parts]
        return torch.cat([loss for loss in losses if loss is not None], 1)

    def _head_loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.core.head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
