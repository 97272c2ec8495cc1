"""torch.ops.sjd2.*: contracts with PyTorch (opcheck), and each op against small cases worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sjd2_kernels import dispatch, reference, rng

INF = float("inf")
ops = torch.ops.sjd2


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(name: str, rule: int = reference.RATIO) -> tuple[Any, ...]:
    """A complete set of arguments: B = 2, W = 4, V = 5, F = 1, D = 3, N = 6."""
    torch.manual_seed(0)
    batch, window, vocab, dim, total = 2, 4, 5, 3, 6
    forced = torch.tensor([-1, -1, 5, -1, -1, -1, 0, 0, 0, 0])
    seeds, lengths, steps, done = torch.tensor([1, 2]), i32(1, 2), i32(1, 2), i32(0, 0)
    table, start, noisy = torch.randn(6, dim), torch.randn(batch, dim), torch.randn(batch, window - 1, dim)
    mean, std, times = torch.randn(dim), torch.rand(dim) + 0.5, torch.tensor([0.3, 1.0])
    p, q = torch.rand(batch, window, vocab).softmax(-1), torch.rand(batch, window - 1, vocab).softmax(-1)
    drafts, decided = torch.tensor([[1, 5, 2], [5, 0, 4]]), torch.tensor([[1, 5, 2, 0], [5, 3, 3, 1]])
    status, levels = torch.tensor([[1, 1, 0]] * 2, dtype=torch.int32), torch.tensor([[-1, -1, 1]] * 2).int()
    every = torch.cat((torch.full((2, 1), -1).int(), levels), 1)
    if name == "embed_window":
        tokens = torch.tensor([[-1, 1, 5, -1], [3, 5, 0, -1]])
        return tokens, every, table, start, noisy, mean, std
    if name == "perturb":
        positions = torch.arange(4).expand(2, 4)
        return torch.randn(2, 4, dim), every, positions, seeds, mean, std, times, 0, True
    if name == "sample_window":
        logits = torch.randn(2, batch, window, vocab)
        return logits, seeds, lengths, steps, None, 3.0, 0.9, 3, 0.9, 0, vocab, False, True
    if name == "verify":
        bad = torch.zeros(batch, window, dtype=torch.bool)
        return decided, p, bad, drafts, q, status, levels, forced, lengths, steps, done, seeds, total, rule
    if name == "commit":
        tokens, histogram = torch.full((2, 10), -1), torch.zeros(2, window + 1, dtype=torch.int64)
        counters = lengths, steps, done, i32(-1, -1), i32(-1, -1), histogram, i32(4, 5, 1, 1)
        return decided, i32(2, 3), i32(-1, -1), tokens, *counters, total
    initial, ratios = torch.zeros(2, 10, dtype=torch.int64), torch.tensor([0.0, 0.3])
    state = drafts, status, levels, q, noisy
    constants = table, mean, std, ratios, None, None, seeds, 1
    return decided, p, i32(2, 3), i32(2, 3), lengths, forced, initial, *state, *constants


@pytest.mark.parametrize("name", dispatch.C)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name), arguments(name))


def test_opcheck_of_gradients_and_variants() -> None:
    for denormalize in (True, False):
        x, *rest = arguments("perturb")
        torch.library.opcheck(ops.perturb, (x.requires_grad_(), *rest[:-1], denormalize))
    logits, *rest = arguments("sample_window")
    torch.library.opcheck(ops.sample_window, (logits[0].bfloat16(), *rest[:-1], False))
    for need_p in (False, True):
        greedy = [*rest[:4], 1.0, 0.0, *rest[6:-1], need_p]
        torch.library.opcheck(ops.sample_window, (logits[0].contiguous(), *greedy))
    for rule in (reference.MATCH, reference.COUPLED, reference.PAPER):
        torch.library.opcheck(ops.verify, arguments("verify", rule))


# -------------------------------------------------------------------- embed_window, perturb


def test_embed_window() -> None:
    tokens, levels, table, start, noisy, mean, std = arguments("embed_window")
    got = ops.embed_window(tokens, levels, table, start, noisy, mean, std)
    assert torch.equal(got[0, 0], start[0]) and torch.equal(got[1, 0], table[3])
    assert torch.equal(got[0, 1:3], table[[1, 5]])
    assert torch.allclose(got[:, 3], noisy[:, 2] * std + mean)
    half = ops.embed_window(tokens, levels, table.bfloat16(), start.bfloat16(), noisy, mean, std)
    assert half.dtype == torch.bfloat16 and torch.equal(half[0, 1], table[1].bfloat16())
    assert torch.equal(ops.embed_window(tokens, levels, table, start, None, None, None)[1, 1:3], table[[5, 0]])


def test_perturb() -> None:
    x, levels, positions, seeds, mean, std, times, epoch, _ = arguments("perturb")
    e = ops.perturb(x, levels, positions, seeds, mean, std, times, epoch, False)
    noise = rng.normals(seeds, positions, epoch, 3)
    clean = (x - mean) / std
    assert torch.allclose(e[:, :3], clean[:, :3])
    assert torch.allclose(e[:, 3], noise[:, 3])  # level 1 has t = 1: pure noise
    some = ops.perturb(x, torch.zeros_like(levels), positions, seeds, mean, std, times, epoch, False)
    assert torch.allclose(some, 0.7 * clean + 0.3 * noise, atol=1e-6)
    back = ops.perturb(x, levels, positions, seeds, mean, std, times, epoch, True)
    assert torch.equal(back[:, :3], x[:, :3]) and torch.allclose(back[:, 3], noise[:, 3] * std + mean)
    assert not torch.equal(some, ops.perturb(x, torch.zeros_like(levels), positions, seeds, mean, std, times, 1, False))


def test_perturb_has_the_gradient_of_its_formula() -> None:
    x, _, positions, seeds, mean, std, times, epoch, _ = arguments("perturb")
    levels = torch.tensor([[0, -1, 1, 0]] * 2).int()
    keep = torch.tensor([0.7, 1.0, 0.0, 0.7])[None, :, None].expand_as(x)
    for denormalize, expected in ((True, keep), (False, keep / std)):
        x = x.detach().requires_grad_()
        ops.perturb(x, levels, positions, seeds, mean, std, times, epoch, denormalize).sum().backward()
        assert x.grad is not None and torch.allclose(x.grad, expected)


# -------------------------------------------------------------------- sample_window


def sample(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, vocab = logits.shape[-3], logits.shape[-1]
    zero = torch.zeros(batch, dtype=torch.int32)
    settings = {
        "noise": None, "guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "legal_begin": 0,
        "legal_end": vocab, "per_position": True, "need_p": True,
    }  # fmt: skip
    return ops.sample_window(logits, torch.arange(batch), zero, zero, **(settings | options))


def test_guidance_and_masks() -> None:
    cond, uncond = torch.tensor([[[1.0, 2.0, -INF, 0.0]]]), torch.tensor([[[0.0, 3.0, -INF, -INF]]])
    _, p, bad = sample(torch.stack((cond, uncond)), guidance=3.0)
    assert torch.allclose(p[0, 0], torch.tensor([3.0, 0.0, -INF, -INF]).softmax(-1)) and not bad.any()
    _, p, _ = sample(cond, guidance=3.0)  # without an unconditional set there is nothing to guide
    assert torch.allclose(p[0, 0], cond[0, 0].softmax(-1))


def test_legal_range_may_hide_anything() -> None:
    logits = torch.tensor([[[torch.nan, 1.0, 2.0, INF]]])
    tokens, p, bad = sample(logits, legal_begin=1, legal_end=3)
    assert not bad.any() and int(tokens) in (1, 2)
    assert torch.allclose(p[0, 0, 1:3], torch.tensor([1.0, 2.0]).softmax(-1)) and p[0, 0, [0, 3]].sum() == 0


def test_temperature() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0]]])
    tokens, p, _ = sample(logits, temperature=0.0)
    assert tokens.item() == 1 and p.tolist() == [[[0.0, 1.0, 0.0]]]
    assert torch.allclose(sample(logits, temperature=0.5)[1], (logits * 2).softmax(-1))


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 0.0]]])
    assert (sample(logits, top_k=2)[1] > 0).tolist() == [[[True, False, True, True, False]]]
    assert (sample(logits, top_k=1)[1] > 0).sum() == 1
    assert (sample(logits, top_k=99)[1] > 0).all()


def test_top_p_keeps_the_smallest_sufficient_set_and_ties() -> None:
    logits = torch.tensor([[[0.5, 0.2, 0.2, 0.1]]]).log()
    assert (sample(logits, top_p=0.4)[1] > 0).tolist() == [[[True, False, False, False]]]
    assert (sample(logits, top_p=0.6)[1] > 0).tolist() == [[[True, True, True, False]]]
    assert (sample(logits, top_p=0.95)[1] > 0).all()


def test_draws_are_gumbel_argmax_over_log_p() -> None:
    torch.manual_seed(1)
    logits, seeds = torch.randn(3, 4, 6), torch.arange(3)
    lengths, steps, positions = i32(2, 0, 5), i32(7, 8, 9), torch.tensor([[2], [0], [5]]) + torch.arange(4)
    for per_position, iteration in ((True, 0), (False, steps + 1)):
        noise = rng.gumbel(seeds, positions, iteration, rng.SAMPLE, 6)
        tokens, p, _ = ops.sample_window(
            logits, seeds, lengths, steps, None, 1.0, 1.0, 4, 1.0, 0, 6, per_position, True
        )
        assert torch.equal(tokens, (p.log() + noise).argmax(-1))
    table = rng.gumbel(seeds, torch.arange(12).expand(3, -1), 0, rng.SAMPLE, 6)
    got = ops.sample_window(logits, seeds, lengths, steps, table, 1.0, 1.0, 4, 1.0, 0, 6, True, False)
    plain = ops.sample_window(logits, seeds, lengths, steps, None, 1.0, 1.0, 4, 1.0, 0, 6, True, True)
    assert torch.equal(got[0], plain[0]) and got[1].shape == (3, 4, 0)


@pytest.mark.parametrize("value, expected", [(torch.nan, True), (INF, True), (-INF, False)])
def test_bad_logits(value: float, expected: bool) -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = value
    assert sample(logits)[2].tolist() == [[False, expected, False]]
    assert sample(torch.stack((logits, logits)), guidance=2.0)[2].tolist() == [[False, expected, False]]
    assert sample(torch.full((1, 1, 4), -INF))[2].item()


def test_arguments_are_left_alone() -> None:
    for name in ("embed_window", "perturb", "sample_window", "verify"):
        values = arguments(name)
        copies = [value.clone() if isinstance(value, Tensor) else value for value in values]
        getattr(ops, name)(*values)
        for value, copy in zip(values, copies):
            assert not isinstance(value, Tensor) or torch.equal(value, copy)


# -------------------------------------------------------------------- verify


def verify(rule: int, **changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row: V = 3, N = 6, image positions only, three clean tracked drafts 0, 1, 2 that surely pass."""
    sure = torch.eye(3)[None]
    values = {
        "tokens": torch.tensor([[0, 1, 2, 1]]), "p": torch.cat((sure, sure[:, :1]), 1),
        "bad": torch.zeros(1, 4, dtype=torch.bool), "drafts": torch.tensor([[0, 1, 2]]), "q": sure.clone(),
        "status": i32(1, 1, 1)[None], "levels": i32(-1, -1, -1)[None],
        "forced": torch.tensor([-1] * 6 + [0] * 4), "lengths": i32(1), "steps": i32(3), "done": i32(0),
        "seeds": torch.tensor([5]), "total": 6, "rule": rule,
    }  # fmt: skip
    return ops.verify(**(values | changes))


RULES = [reference.MATCH, reference.RATIO, reference.COUPLED, reference.PAPER]


@pytest.mark.parametrize("rule", RULES)
def test_all_drafts_and_the_bonus_token(rule: int) -> None:
    decided, accepted, settled, fault = verify(rule)
    assert decided.tolist() == [[0, 1, 2, 1]]
    assert (accepted.item(), settled.item(), fault.item()) == (4, 4, -1)


@pytest.mark.parametrize("rule", RULES)
def test_the_picture_ends(rule: int) -> None:
    assert verify(rule, lengths=i32(4))[1].item() == 2
    assert verify(rule, lengths=i32(6), done=i32(1))[1].item() == 0
    assert verify(rule, done=i32(1))[1].item() == 0


@pytest.mark.parametrize("rule", RULES)
def test_forced_positions_always_pass(rule: int) -> None:
    forced = torch.tensor([-1, 3, 4, -1, -1, -1, 0, 0, 0, 0])
    decided, accepted, _, _ = verify(rule, forced=forced, drafts=torch.tensor([[3, 4, 2]]))
    assert decided.tolist() == [[3, 4, 2, 1]] and accepted.item() == 4


@pytest.mark.parametrize("rule", RULES)
def test_bad_slots_end_the_row_but_not_where_a_token_is_forced(rule: int) -> None:
    bad = torch.tensor([[False, True, True, False]])
    _, accepted, _, fault = verify(rule, bad=bad)
    assert (accepted.item(), fault.item()) == (0, 2)
    assert verify(rule, bad=bad, done=i32(1))[3].item() == -1
    forced = torch.tensor([-1, -1, 4, 4, -1, -1, 0, 0, 0, 0])
    assert verify(rule, bad=bad, forced=forced, drafts=torch.tensor([[0, 4, 4]]))[1:4:2] == (i32(4), i32(-1))


def test_match_stops_at_the_first_difference_and_keeps_the_new_draw() -> None:
    decided, accepted, _, _ = verify(reference.MATCH, drafts=torch.tensor([[0, 2, 2]]))
    assert decided.tolist() == [[0, 1, 2, 1]] and accepted.item() == 2
    assert verify(reference.MATCH, levels=i32(-1, 0, -1)[None])[1].item() == 2  # noisy: equal, but not accepted


def test_ratio_replaces_the_first_rejected_by_the_residual() -> None:
    p = torch.eye(3)[[0, 2, 2, 1]][None]  # draft 1 at the second slot has p = 0; the residual is token 2
    for rule in (reference.RATIO, reference.COUPLED, reference.PAPER):
        decided, accepted, _, _ = verify(rule, p=p, tokens=torch.tensor([[0, 0, 0, 0]]))
        assert accepted.item() == 2 and decided[0, :2].tolist() == [0, 2]
    # Behind it: RATIO takes the new draw, COUPLED and PAPER keep the draft, which p likes as well as q.
    behind = [verify(rule, p=p, tokens=torch.zeros(1, 4).long())[0][0, 2].item() for rule in RULES[1:]]
    assert behind == [0, 2, 2]


@pytest.mark.parametrize("rule", [reference.RATIO, reference.COUPLED])
def test_fresh_and_noisy_drafts_stop_the_scan(rule: int) -> None:
    decided, accepted, _, _ = verify(rule, status=i32(1, 0, 1)[None], tokens=torch.tensor([[0, 0, 0, 0]]))
    assert accepted.item() == 2 and decided[0, 1].item() == 0  # drawn from p, not tested
    assert verify(rule, levels=i32(-1, 0, 0)[None])[1].item() == 2


def test_paper_accepts_noisy_drafts_but_holds_back_what_follows() -> None:
    decided, accepted, settled, _ = verify(reference.PAPER, levels=i32(-1, 0, 1)[None])
    assert (accepted.item(), settled.item()) == (2, 4) and decided.tolist() == [[0, 1, 2, 1]]
    again = verify(reference.PAPER, status=i32(2, 2, 0)[None], q=torch.zeros(1, 3, 3))
    assert (again[1].item(), again[2].item()) == (3, 3)


def test_acceptance_probability_is_p_over_q() -> None:
    count = 20_000
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.2, 0.2])
    decided, accepted, _, _ = ops.verify(
        torch.zeros(count, 2).long(), p.expand(count, 2, 3), torch.zeros(count, 2, dtype=torch.bool),
        torch.zeros(count, 1).long(), q.expand(count, 1, 3), torch.ones(count, 1).int(),
        torch.full((count, 1), -1).int(), torch.tensor([-1, -1, -1, 0, 0]), torch.zeros(count).int(),
        torch.zeros(count).int(), torch.zeros(count).int(), torch.arange(count), 3, reference.RATIO,
    )  # fmt: skip
    assert float((accepted == 2).float().mean()) == pytest.approx(1 / 3, abs=0.01)
    replaced = decided[accepted == 1, 0]
    assert float((replaced == 1).float().mean()) == pytest.approx(0.75, abs=0.015)
    assert not (replaced == 0).any()


# -------------------------------------------------------------------- commit, refine


def test_commit_moves_every_counter() -> None:
    values = arguments("commit")
    ops.commit(*values)
    _, _, _, tokens, lengths, steps, done, failed, _, histogram, kv_lengths, _ = values
    assert tokens[0, :4].tolist() == [-1, 1, 5, -1] and tokens[1, :6].tolist() == [-1, -1, 5, 3, 3, -1]
    assert lengths.tolist() == [3, 5] and steps.tolist() == [2, 3] and done.tolist() == [0, 0]
    assert histogram[0].tolist() == [0, 0, 1, 0, 0] and kv_lengths.tolist() == [6, 8, 3, 4]
    assert failed.tolist() == [-1, -1]


def test_commit_ends_rows() -> None:
    values = list(arguments("commit"))
    values[1:3] = i32(0, 4), i32(4, -1)
    ops.commit(*values)
    _, _, _, tokens, lengths, steps, done, failed, failed_step, histogram, _, _ = values
    assert lengths.tolist() == [1, 6] and done.tolist() == [1, 1]
    assert failed.tolist() == [4, -1] and failed_step.tolist() == [1, -1] and steps.tolist() == [2, 3]
    before = [value.clone() for value in (tokens, lengths, steps, done, failed, failed_step, histogram)]
    values[1:3] = i32(0, 0), i32(-1, -1)
    ops.commit(*values)
    for value, old in zip((tokens, lengths, steps, done, failed, failed_step, histogram), before):
        assert torch.equal(value, old)


def test_refine_shifts_denoises_and_refills() -> None:
    values = list(arguments("refine"))
    decided, p, _, _, _, _, initial, drafts, status, levels, q, noisy = values[:12]
    values[2] = values[3] = i32(1, 3)
    values[4] = lengths = i32(3, 5)
    levels.copy_(torch.tensor([[1, 0, 1]] * 2))
    initial += 4
    old, table, mean, std, seeds = noisy.clone(), values[12], values[13], values[14], values[18]
    ops.refine(*values)
    # Row 0 moved by one: predictions of slots 1, 2, 3; the last of them has no embedding yet.
    assert drafts[0].tolist() == [5, 2, 0] and status[0].tolist() == [1, 1, 1]
    assert levels[0].tolist() == [-1, 0, 1] and torch.equal(q[0], p[0, 1:])
    target = (table[2] - mean) / std
    assert torch.allclose(noisy[0, 1], 0.3 * old[0, 2] + 0.7 * target, atol=1e-6)
    fresh = rng.normals(seeds, lengths[:, None] + torch.arange(3), 0, 3)
    assert torch.allclose(noisy[0, 2], fresh[0, 2])
    # Row 1 moved by three: position 5 is predicted, positions 6 and 7 lie behind the end.
    assert drafts[1].tolist() == [int(decided[1, 3]), 0, 0] and levels[1].tolist() == [1, -1, -1]
    assert status[1].tolist() == [1, 0, 0] and torch.allclose(noisy[1], fresh[1])


def test_refine_takes_the_nearest_row_by_cosine() -> None:
    values = list(arguments("refine"))
    values[2] = values[3] = i32(1, 1)
    values[4] = i32(3, 3)
    values[9].copy_(torch.tensor([[1, 1, 1]] * 2))
    rows = (values[12][:5] - values[13]) / values[14]
    values[17] = torch.nn.functional.normalize(rows, dim=-1)
    ops.refine(*values)
    cosine = torch.nn.functional.cosine_similarity(values[11][:, :, None], rows[None, None], dim=-1)
    assert torch.equal(values[7], cosine.argmax(-1)) and (values[9] >= 0).all()


def test_refine_without_noise_refills_with_initial_tokens() -> None:
    values = list(arguments("refine"))
    values[2] = values[3] = i32(2, 4)
    values[4] = i32(3, 5)
    values[6] = torch.arange(10).expand(2, 10) % 5
    values[9].fill_(-1)
    values[11:18] = [None] * 7
    values[19] = -1
    ops.refine(*values)
    assert values[7].tolist() == [[2, 0, 0], [0, 0, 0]] and values[8].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert (values[9] == -1).all()
