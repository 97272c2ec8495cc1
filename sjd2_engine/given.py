"""What a caller hands to a window: checked, with errors that say what was given and what is expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import MAX_SEED, DecodeConfig
from .errors import ConfigError
from .layout import TokenLayout


def checked_kv_lengths(kv_lengths: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Cache lengths i32 [R·B] to move along; none: an empty tensor."""
    if kv_lengths is None:
        return torch.empty(0, dtype=torch.int32, device=device)
    if kv_lengths.dtype != torch.int32 or kv_lengths.dim() != 1 or kv_lengths.shape[0] % batch:
        raise ConfigError(f"kv_lengths is {kv_lengths.dtype} {tuple(kv_lengths.shape)}: expected int32 [R·{batch}]")
    return kv_lengths


def image_vocab_of(layout: TokenLayout, embedding: Tensor | None) -> int | None:
    """V as the layout says, else the smallest structure id, else all rows of the embedding."""
    vocab = layout.image_vocab if layout.image_vocab is not None else layout.smallest_forced
    if embedding is None:
        return vocab
    if embedding.dim() != 2 or not embedding.is_floating_point():
        raise ConfigError(f"embedding is {embedding.dtype} {tuple(embedding.shape)}: expected floats [V+F, D]")
    rows = embedding.shape[0]
    needed = max(max(layout.forced) + 1, vocab or 1)
    if rows < needed:
        raise ConfigError(
            f"embedding has {rows} rows, but the layout uses local ids up to {needed - 1}: expected one "
            "row per image id, then one per structure id"
        )
    return rows if vocab is None else vocab


def seed_tensor(
    config: DecodeConfig, seeds: Sequence[int] | Tensor | None, start: Tensor | None, device: torch.device
) -> Tensor:
    """Seeds i64 [B]: those given, else the config's."""
    if seeds is None:
        count = start.shape[0] if start is not None else 1 if isinstance(config.seed, int) else len(config.seed)
        seeds = config.seeds(count)
    return checked_seeds(seeds, None).to(device)


def checked_seeds(seeds: Sequence[int] | Tensor, count: int | None) -> Tensor:
    """Seeds i64 on the CPU, `count` of them (None: at least one)."""
    values = [int(value) for value in seeds]
    wrong_count = not values if count is None else len(values) != count
    if wrong_count or any(not 0 <= value <= MAX_SEED for value in values):
        rows = "at least one row" if count is None else f"{count} rows"
        raise ConfigError(f"seeds={values}: expected one integer from 0 to 2**63 - 1 per row, for {rows}")
    return torch.tensor(values, dtype=torch.int64)


def check_rows(rows: Sequence[int], batch: int) -> None:
    """Raise ConfigError unless these are different rows of the batch, at least one."""
    if not rows or len({*rows}) < len(rows) or any(not 0 <= row < batch for row in rows):
        raise ConfigError(f"rows={list(rows)}: expected different rows from 0 to {batch - 1}, at least one")


def checked_start(start: Tensor | None, embedding: Tensor | None, batch: int) -> Tensor | None:
    """Start embeddings [B, D] in the table's dtype; None for a window without a table."""
    if embedding is None:
        if start is not None:
            raise ConfigError("start_embeds were given without an embedding: give both, or neither")
        return None
    wanted = (batch, embedding.shape[1])
    if start is None or tuple(start.shape) != wanted:
        got = None if start is None else tuple(start.shape)
        raise ConfigError(
            f"start_embeds have shape {got}: expected {wanted}, the embedding of each prompt's last token, "
            f"one row for each of the {batch} seeds"
        )
    return start.detach().to(embedding)
