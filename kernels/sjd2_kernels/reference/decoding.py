"""The meaning of every decoding op, in plain PyTorch on any device.

Names, everywhere in this project: `p` is the target distribution of this forward pass, `q` the one a
draft was drawn from. B rows, W slots (slot 0 = last accepted token, slot j+1 = draft j), V image ids,
D embedding dimensions, N positions, P >= N + W positions with padding. `lengths` counts accepted tokens,
so slot i predicts position lengths + i and draft j sits at position lengths + j.
`forced` i64 [P] holds −1 for image tokens, the id of a structure token, or 0 for padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rng

# How drafts are verified (`rule`).
MATCH = 0  # a clean draft passes when it equals the new draw
RATIO = 1  # u·q(x) < p(x); behind the first rejection every draft is drawn anew from p
COUPLED = 2  # as RATIO, but every draft with a q passes the same test: kept, else drawn from the residual
PAPER = 3  # SJD2 as published: noisy drafts may pass, likely ones behind the rejection are kept (not exact)

# What is known about a draft (`status`).
FRESH = 0  # nothing: it cannot be tested
TRACKED = 1  # drawn from q
SETTLED = 2  # accepted while noisy; only its clean key/value is missing (PAPER)

KEEP_RATIO = 0.5  # PAPER: an unaccepted clean draft stays when p(x)/q(x) reaches this


def embed_window(
    tokens: Tensor,
    levels: Tensor,
    table: Tensor,
    start: Tensor,
    noisy: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    """Model inputs [B, W, D] in the table's dtype: rows of `table`, or std·e + mean where a draft is noisy.

    tokens i64 [B, W] (−1 in slot 0: take `start` [B, D]), levels i32 [B, W] (−1 = clean), table [V+F, D],
    noisy f32 [B, W−1, D] in the normalised space, mean and std f32 [D].
    """
    batch, window = tokens.shape
    embeds = table.index_select(0, tokens.clamp(min=0).flatten()).view(batch, window, table.shape[1])
    embeds[:, 0] = torch.where(tokens[:, :1] < 0, start, embeds[:, 0])
    if noisy is not None and mean is not None and std is not None:
        dirty = torch.addcmul(mean, noisy, std).to(table.dtype)
        embeds[:, 1:] = torch.where(levels[:, 1:, None] >= 0, dirty, embeds[:, 1:])
    return embeds


def perturb(
    x: Tensor,
    levels: Tensor,
    positions: Tensor,
    seeds: Tensor,
    mean: Tensor,
    std: Tensor,
    times: Tensor,
    epoch: int,
    denormalize: bool,
) -> Tensor:
    """Noise embeddings to each position's level: e = (x − mean)/std, then (1 − t)·e + t·noise.

    x [B, L, D] in model space, levels i32 [B, L] (−1: left clean), positions i64 [B, L], seeds i64 [B],
    times f32 [K]. Returns f32 normalised embeddings, or with `denormalize` model space in x's dtype
    (clean positions then equal x bit for bit).
    """
    t = times[levels.clamp(min=0)].unsqueeze(-1)
    clean = (x.float() - mean) / std
    noise = rng.normals(seeds, positions, epoch, x.shape[-1])
    e = torch.where(levels.unsqueeze(-1) >= 0, clean + t * (noise - clean), clean)
    if not denormalize:
        return e
    return torch.where(levels.unsqueeze(-1) >= 0, torch.addcmul(mean, e, std).to(x.dtype), x)


def sample_window(
    logits: Tensor,
    seeds: Tensor,
    lengths: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    legal_begin: int,
    legal_end: int,
    per_position: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token for every slot from p = softmax of the guided, masked, truncated logits.

    logits [B, W, V], or [2, B, W, V] = (cond, uncond); seeds i64 [B]; lengths, steps i32 [B]; noise f32
    [B, P, V] or None: the position-keyed Gumbel noise, where it is at hand. `per_position` keys the noise by
    position alone, else also by steps + 1. Only ids in [legal_begin, legal_end) can be drawn.
    Returns tokens i64 [B, W], p f32 [B, W, V] (or [B, W, 0]), bad bool [B, W]: NaN, +inf or no finite logit.
    """
    x = _guided(logits, guidance)
    batch, window, vocab = x.shape
    if legal_begin > 0 or legal_end < vocab:
        ids = torch.arange(vocab, device=x.device)
        x = x.masked_fill((ids < legal_begin) | (ids >= legal_end), float("-inf"))
    bad = x.amax(-1).isfinite().logical_not_()
    if temperature == 0.0:
        tokens = x.argmax(-1)
        p = x.new_zeros(x.shape if need_p else (batch, window, 0))
        return tokens, p.scatter_(-1, tokens.unsqueeze(-1), 1.0) if need_p else p, bad
    if temperature != 1.0:
        x = x / temperature
    x = _truncated(x, top_k, top_p)
    positions = lengths[:, None] + torch.arange(window, device=x.device)
    if not per_position:
        drawn = rng.gumbel(seeds, positions, steps + 1, rng.SAMPLE, vocab)
    elif noise is None:
        drawn = rng.gumbel(seeds, positions, 0, rng.SAMPLE, vocab)
    else:
        drawn = _rows(noise, positions)
    p = x.softmax(-1) if need_p else x.new_empty(batch, window, 0)
    return drawn.add_(x).argmax(-1), p, bad


def verify(
    tokens: Tensor,
    p: Tensor,
    bad: Tensor,
    drafts: Tensor,
    q: Tensor,
    status: Tensor,
    levels: Tensor,
    forced: Tensor,
    lengths: Tensor,
    steps: Tensor,
    done: Tensor,
    seeds: Tensor,
    total: int,
    rule: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scan the drafts and decide the token of every slot's position.

    tokens i64 [B, W] drawn from p f32 [B, W, V]; drafts i64, status i32, levels i32 [B, W−1] and their
    q f32 [B, W−1, V] (p and q may have no ids for MATCH); lengths, steps, done i32 [B]; total = N.
    Returns decided i64 [B, W], the tokens of positions lengths, lengths+1, …; accepted i32 [B], how many of
    them enter the picture now; settled i32 [B] ≥ accepted, how many of them are final (more than accepted
    only for PAPER); fault i32 [B], the first position with bad logits, else −1.
    """
    window = tokens.shape[1]
    slots = torch.arange(window, device=tokens.device)
    positions = lengths[:, None] + slots
    known = forced.take(positions)
    open_ = known < 0
    decided = torch.where(open_, tokens, known)
    if rule == MATCH:
        run = _run((drafts == decided[:, :-1]) & (levels < 0))
    else:
        u, noise = rng.acceptance_draws(seeds, positions[:, :-1], steps + 1, p.shape[-1])
        decided, run = _ratio_scan(decided, open_[:, :-1], p[:, :-1], drafts, q, status, levels, u, noise, rule)
    faulty = bad & open_ & (done == 0)[:, None]
    failing = faulty.any(1)
    fault = torch.where(failing, lengths + faulty.to(torch.int32).argmax(1), -1).to(torch.int32)
    settled = torch.minimum(run + 1, total - lengths).masked_fill(failing | (done != 0), 0).to(torch.int32)
    if rule != PAPER:
        return decided, settled, settled.clone(), fault
    # Keys and values of noisy inputs are wrong: what lies behind the first of them waits for a clean pass.
    trusted = _run((levels < 0) | (slots[:-1] >= run[:, None]))
    return decided, torch.minimum(settled, trusted + 1).to(torch.int32), settled, fault


def commit(
    decided: Tensor,
    accepted: Tensor,
    fault: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    steps: Tensor,
    done: Tensor,
    failed: Tensor,
    failed_step: Tensor,
    histogram: Tensor,
    kv_lengths: Tensor,
    total: int,
) -> None:
    """Write the accepted tokens and move every counter of the rows still at work (all in place).

    tokens i64 [B, P]; lengths, steps, done, failed, failed_step i32 [B] (failed: position, −1 = fine);
    histogram i64 [B, W+1] counts steps by accepted tokens; kv_lengths i32 [R·B], any number R of KV rows per
    image (cond rows first, then uncond): the rollback. Rows that are done do not change.
    """
    batch, window = decided.shape
    slots = torch.arange(window, device=decided.device)
    positions = lengths[:, None] + slots
    old = tokens.gather(1, positions)
    tokens.scatter_(1, positions, torch.where(slots < accepted[:, None], decided, old))
    live = (done == 0).to(torch.int32)
    histogram.scatter_add_(1, accepted.to(torch.int64)[:, None], live.to(torch.int64)[:, None])
    failing = fault >= 0
    torch.where(failing, fault, failed, out=failed)
    torch.where(failing, steps, failed_step, out=failed_step)
    lengths += accepted
    steps += live
    if kv_lengths.numel():
        kv_lengths.view(-1, batch).add_(accepted)
    done |= (failing | (lengths >= total)).to(torch.int32)


def refine(
    decided: Tensor,
    p: Tensor,
    accepted: Tensor,
    settled: Tensor,
    lengths: Tensor,
    forced: Tensor,
    initial: Tensor,
    drafts: Tensor,
    status: Tensor,
    levels: Tensor,
    q: Tensor,
    noisy: Tensor | None,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    ratios: Tensor | None,
    noise: Tensor | None,
    directions: Tensor | None,
    seeds: Tensor,
    fresh_level: int,
) -> None:
    """Shift the drafts (in place) by `accepted`, take the predictions over, denoise one level, refill.

    decided, p, accepted, settled as from `verify`; lengths already moved; initial i64 [B, P] token drafts
    for positions without a prediction. State: drafts i64, status i32, levels i32 [B, W−1], q f32
    [B, W−1, V] (or without ids), noisy f32 [B, W−1, D] (None where no draft is ever noisy).
    Denoising, SJD2 Eq. 3 for flow matching: e ← r·e + (1−r)·ê0 with ê0 the normalised row of the token
    predicted for the same position and r = ratios[level] = t[k−1]/t[k]; from level 0 the draft gets clean.
    New positions take level `fresh_level` and standard normal noise (`noise` f32 [B, P, D], where at hand).
    With `directions` f32 [V, D] (unit rows) the token of a noisy draft is its nearest row by cosine.
    """
    window = decided.shape[1]
    count = window - 1
    if count == 0:
        return
    source = accepted[:, None] + torch.arange(count, device=decided.device)
    predicted = source < window
    source = source.clamp(max=count)
    positions = lengths[:, None] + torch.arange(count, device=decided.device)
    known = forced.take(positions)
    token = torch.where(predicted, decided.gather(1, source), initial.gather(1, positions))
    token = torch.where(known >= 0, known, token)
    if q.shape[-1]:
        q.copy_(_rows(p, source))
    if noisy is not None:
        certain = (known >= 0) | (source < settled[:, None]) & predicted
        token = _denoise(
            token, source, positions, certain, levels, noisy, table, mean, std, ratios, noise, directions,
            seeds, fresh_level,
        )  # fmt: skip
        status.copy_(predicted.to(torch.int32) + ((source < settled[:, None]) & predicted).to(torch.int32))
    else:
        status.copy_(predicted)
    drafts.copy_(token)


def _denoise(
    token: Tensor,
    source: Tensor,
    positions: Tensor,
    certain: Tensor,
    levels: Tensor,
    noisy: Tensor,
    table: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    ratios: Tensor | None,
    noise: Tensor | None,
    directions: Tensor | None,
    seeds: Tensor,
    fresh_level: int,
) -> Tensor:
    """One level down for drafts that had an embedding, noise for new ones; returns the drafts' tokens."""
    assert table is not None and mean is not None and std is not None and ratios is not None
    last = levels.shape[1] - 1
    carried = source <= last
    source = source.clamp(max=last)
    level = levels.gather(1, source)
    target = (table.index_select(0, token.flatten()).view(*token.shape, noisy.shape[-1]).float() - mean) / std
    r = ratios[level.clamp(min=0)].unsqueeze(-1)
    refined = target + r * (_rows(noisy, source) - target)
    fresh = rng.normals(seeds, positions, 0, noisy.shape[-1]) if noise is None else _rows(noise, positions)
    noisy.copy_(torch.where(carried.unsqueeze(-1), refined, fresh))
    level = torch.where(carried, (level - 1).clamp(min=-1), fresh_level)
    levels.copy_(level.masked_fill(certain, -1))
    if directions is None:
        return token
    return torch.where(levels >= 0, (noisy @ directions.T).argmax(-1), token)


def _ratio_scan(
    decided: Tensor,
    open_: Tensor,
    p: Tensor,
    drafts: Tensor,
    q: Tensor,
    status: Tensor,
    levels: Tensor,
    u: Tensor,
    noise: Tensor,
    rule: int,
) -> tuple[Tensor, Tensor]:
    """Decided tokens [B, W] and the number of drafts [B] that pass, for the rules with a ratio test."""
    ids = drafts.clamp(max=p.shape[-1] - 1).unsqueeze(-1)
    p_x, q_x = p.gather(-1, ids).squeeze(-1), q.gather(-1, ids).squeeze(-1)
    tested = open_ & (status == TRACKED)
    clean = levels < 0
    kept = tested & (u * q_x < p_x)
    excess = (p - q).clamp_(min=0.0)
    excess = torch.where(excess.sum(-1, keepdim=True) > 0, excess, p)
    replacement = excess.log_().add_(noise).argmax(-1)
    drawn = decided[:, :-1]
    if rule == COUPLED:
        run = _run(~open_ | (kept & clean))
        drawn = torch.where(kept, drafts, torch.where(tested, replacement, drawn))
    else:
        testable = tested if rule == PAPER else tested & clean
        passed = ~open_ | (status == SETTLED) | (kept & testable)
        run = _run(passed)[:, None]
        slots = torch.arange(drafts.shape[1], device=drafts.device)
        stays = slots < run
        if rule == PAPER:
            stays = stays | (tested & clean & (slots > run) & (p_x >= KEEP_RATIO * q_x))
        drawn = torch.where((slots == run) & testable, replacement, drawn)
        drawn = torch.where(stays, drafts, drawn)
        run = run.squeeze(1)
    return torch.cat((drawn, decided[:, -1:]), 1), run


def _guided(logits: Tensor, guidance: float) -> Tensor:
    """Float32 logits; with two sets l_uncond + s·(l_cond − l_uncond), where −inf in either set masks."""
    if logits.dim() == 3:
        return logits.float()
    cond, uncond = logits.float().unbind(0)
    guided = torch.add(uncond, cond - uncond, alpha=guidance)
    return guided.masked_fill_(torch.minimum(cond, uncond) == float("-inf"), float("-inf"))


def _truncated(x: Tensor, top_k: int, top_p: float) -> Tensor:
    """Mask everything below the k-th largest logit, then below the nucleus of mass `top_p`; ties stay."""
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k, sorted=False).values.amin(-1, keepdim=True), float("-inf"))
    if top_p < 1.0:
        ordered = x.sort(-1, descending=True).values
        mass = ordered.softmax(-1)
        inside = mass.cumsum(-1) - mass < top_p
        threshold = ordered.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
        x = x.masked_fill(x < threshold, float("-inf"))
    return x


def _run(passed: Tensor) -> Tensor:
    """Length of the leading run of True: bool [B, n] → i64 [B]."""
    return passed.to(torch.int64).cumprod(1).sum(1)


def _rows(source: Tensor, index: Tensor) -> Tensor:
    """source[b, index[b, i]] for [B, n, X] and [B, m] → [B, m, X], always a new tensor."""
    batch, length, size = source.shape
    if batch > 1:
        index = index + torch.arange(0, batch * length, length, device=index.device)[:, None]
    return source.reshape(batch * length, size).index_select(0, index.flatten()).view(*index.shape, size)
