"""Triton `verify` and `commit` against the reference, and whole decodes on them: on a GPU, else in the interpreter.

Every output is an integer and must be equal. A residual draw may differ where its two best scores are closer than
`NEAR` (p and noise differ from the reference by an ulp on a GPU); such slots are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from guarded import Guards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import arguments
from torch import Tensor
from toy import PrefixModel, decode
from triton_mode import DEVICE

from sjd2_engine import DecodeConfig, TokenLayout
from sjd2_kernels import backend, reference, rng
from sjd2_kernels.dispatch import NotSupported
from sjd2_kernels.reference import COUPLED, FRESH, MATCH, PAPER, RATIO, SETTLED, TRACKED

verification = pytest.importorskip("sjd2_kernels.verification", reason="triton is not installed", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy takes logarithms of 0

RULES = {"match": MATCH, "ratio": RATIO, "coupled": COUPLED, "paper": PAPER}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
NEAR = 1e-5
NAN = float("nan")


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on_device(args: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in args)


def verify_case(batch: int, window: int, vocab: int, seed: int, rule: int, structure: int = 3) -> tuple[Any, ...]:
    """Arguments of verify: drafts of every kind, likely and unlikely, in rows at every stage."""
    make = torch.Generator().manual_seed(seed)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=make) < share

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=make)

    count, total = window - 1, 3 * window
    forced = torch.where(chance(0.15, total + window), vocab + integers(structure, total + window), -1)
    forced[total:] = 0
    lengths = integers(total + 1, batch).int()
    p = torch.randn(batch, window, vocab, generator=make).mul(2).softmax(-1)
    other = torch.randn(batch, count, vocab, generator=make).mul(2).softmax(-1)
    q = torch.where(chance(0.3, batch, count, 1), p[:, :-1], other)  # p == q for some
    q = torch.where(chance(0.1, batch, count, 1), torch.zeros(()), q)
    tokens, drafts = integers(vocab, batch, window), integers(vocab + structure, batch, count)
    drafts = torch.where(chance(0.4, batch, count), p[:, :-1].argmax(-1), drafts)
    drafts = torch.where(chance(0.3, batch, count), tokens[:, :-1], drafts)
    status = torch.where(chance(0.8, batch, count), TRACKED, torch.where(chance(0.5, batch, count), SETTLED, FRESH))
    levels = torch.where(chance(0.8, batch, count), -1, integers(3, batch, count))
    bad, done = chance(0.05, batch, window), (chance(0.2, batch) | (lengths == total)).int()
    seeds = integers(2**62, batch)
    return (
        tokens, p, bad, drafts, q, status.int(), levels.int(), forced, lengths, integers(99, batch).int(), done,
        seeds, total, rule,
    )  # fmt: skip


def verify(monkeypatch: pytest.MonkeyPatch, args: tuple[Any, ...]) -> list[Tensor]:
    """The kernel's outputs on the CPU; whatever it allocates is poisoned, and guarded on both sides."""
    guards, inputs = Guards(), on_device(args)
    before = [x.clone() for x in inputs[:-2]]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, dtype, device: guards.empty(shape, dtype, device))
        got = verification.verify(*inputs)
    guards.check()
    for x, y in zip(inputs, before):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was changed"
    return [x.cpu() for x in got]


def near_tie(args: tuple[Any, ...], row: int, slot: int) -> bool:
    """Whether the residual of a draft has two scores that rounding may swap."""
    _, p, _, _, q, _, _, _, lengths, steps, _, seeds, *_ = args
    position = (lengths[row] + slot).long().view(1, 1)
    noise = rng.gumbel(seeds[row : row + 1], position, steps[row : row + 1] + 1, rng.RESIDUAL, p.shape[-1])[0, 0]
    excess = (p[row, slot] - q[row, slot]).clamp(min=0)
    best = ((excess if bool(excess.sum() > 0) else p[row, slot]).log() + noise).topk(2).values
    return bool(best[0] - best[1] < NEAR)


def assert_same(got: list[Tensor], wanted: tuple[Tensor, ...], args: tuple[Any, ...]) -> int:
    """Equal but for near ties, which it returns the number of."""
    for name, x, y in zip(("accepted", "settled", "fault"), got[1:], wanted[1:]):
        assert x.dtype == y.dtype and torch.equal(x, y), name
    assert got[0].dtype == wanted[0].dtype
    differing = (got[0] != wanted[0]).nonzero().tolist()
    assert all(near_tie(args, row, slot) for row, slot in differing), differing
    return len(differing)


# -------------------------------------------------------------------- verify


@every_rule
@pytest.mark.parametrize(
    ("batch", "window", "vocab"),
    [(1, 1, 5), (3, 2, 1), (4, 7, 5), (2, 16, 257), (1, 33, 1000), (16, 5, 64), (1, 96, 40), (1, 128, 3), (1, 3, 3000)],
)
def test_verify(batch: int, window: int, vocab: int, rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ties = 0
    for seed in range(3 if batch * window < 50 else 1):
        args = verify_case(batch, window, vocab, seed, rule)
        ties += assert_same(verify(monkeypatch, args), reference.verify(*args), args)
    assert ties <= 1


@pytest.mark.parametrize("rule", [RATIO, COUPLED], ids=["ratio", "coupled"])
@pytest.mark.parametrize("vocab", [pytest.param(40000, marks=pytest.mark.slow), 184622])
def test_large_vocabularies(vocab: int, rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = verify_case(1, 3, vocab, 8, rule, structure=2)
    args[5][:], args[6][:], args[7][:] = TRACKED, -1, -1
    args[4][:, 0, args[3][0, 0]] = 1.0  # unlikely under p: rejected
    args[8][:] = 0
    wanted = reference.verify(*args)
    assert wanted[0][0, 0] != args[3][0, 0]
    assert assert_same(verify(monkeypatch, args), wanted, args) == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(1, 3), window=st.integers(1, 6), vocab=st.integers(1, 6), seed=st.integers(0, 2**31),
    rule=st.sampled_from(list(RULES.values())),
)  # fmt: skip
def test_verify_for_any_state(batch: int, window: int, vocab: int, seed: int, rule: int) -> None:
    args = verify_case(batch, window, vocab, seed, rule)
    got = [x.cpu() for x in verification.verify(*on_device(args))]
    assert assert_same(got, reference.verify(*args), args) == 0


def one_draft(p: list[float], q: list[float], draft: int, rule: int, seed: int) -> tuple[Any, ...]:
    """One row, one tracked clean draft, and a bonus slot with the same p."""
    wide = torch.tensor(p).expand(1, 2, -1).contiguous()
    return (
        torch.tensor([[0, 1]]), wide, torch.zeros(1, 2, dtype=torch.bool), torch.tensor([[draft]]),
        torch.tensor(q).view(1, 1, -1), i32(TRACKED).view(1, 1), i32(-1).view(1, 1), torch.full((6,), -1), i32(0),
        i32(seed), i32(0), torch.tensor([seed]), 4, rule,
    )  # fmt: skip


@pytest.mark.parametrize("rule", [RATIO, COUPLED, PAPER], ids=["ratio", "coupled", "paper"])
@pytest.mark.parametrize(
    ("p", "q", "draft", "decided"),
    [
        ([0.5, 0.5], [0.5, 0.5], 1, 1),  # p == q: always kept
        ([0.0, 1.0], [1.0, 0.0], 0, 1),  # p(x) = 0: never kept, the residual has one id
        ([0.4, 0.6], [0.0, 1.0], 0, 0),  # q(x) = 0 < p(x): kept
        ([0.0, 1.0], [0.0, 1.0], 0, 1),  # both 0, and no excess anywhere: drawn from p
        ([0.0, 0.0, 1.0], [0.3, 0.3, 0.4], 1, 2),
    ],
)
def test_ratio_test_at_its_edges(
    p: list[float], q: list[float], draft: int, decided: int, rule: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        args = one_draft(p, q, draft, rule, seed)
        got = verify(monkeypatch, args)
        assert assert_same(got, reference.verify(*args), args) == 0
        assert got[0][0, 0] == decided and got[1].tolist() == [2 if decided == draft else 1]


@pytest.mark.parametrize("rule", [RATIO, COUPLED, PAPER], ids=["ratio", "coupled", "paper"])
def test_lost_rows(rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in p (bad logits) or q (left by them): defined, as in the reference, and without effect on other rows."""
    args = verify_case(3, 4, 6, 1, rule)
    args[2][:], args[7][:], args[10][:] = False, -1, 0
    args[8][:] = i32(2, 3, 4)
    args[1][0], args[4][1], args[2][0] = NAN, NAN, True
    got = verify(monkeypatch, args)
    assert assert_same(got, reference.verify(*args), args) == 0
    assert got[3].tolist() == [2, -1, -1] and got[1][0] == 0


@every_rule
def test_verify_of_an_empty_batch(rule: int) -> None:
    case = enumerate(verify_case(1, 4, 5, 0, rule))
    args: list[Any] = [x[:0] if isinstance(x, Tensor) and n != 7 else x for n, x in case]
    got = verification.verify(*on_device(args))
    assert [x.shape for x in got] == [x.shape for x in reference.verify(*args)]


# -------------------------------------------------------------------- commit


def commit_case(batch: int, window: int, sets: int, seed: int) -> list[Any]:
    """Arguments of commit: rows at work, failing, ending and done."""
    make = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=make)

    total = 3 * window
    lengths = integers(total + 1, batch).int()
    done = ((lengths == total) | (integers(4, batch) == 0)).int()
    fault = torch.where((integers(5, batch) == 0) & (done == 0), lengths, -1)
    accepted = torch.minimum(integers(window + 1, batch), total - lengths).masked_fill((done != 0) | (fault >= 0), 0)
    return [
        integers(50, batch, window), accepted.int(), fault.int(), integers(50, batch, total + window), lengths,
        integers(99, batch).int(), done, integers(9, batch).int() - 1, integers(9, batch).int() - 1,
        integers(9, batch, window + 1), integers(99, sets * batch).int(), total,
    ]  # fmt: skip


def assert_commits_alike(args: list[Any]) -> None:
    guards = Guards()
    wanted: list[Any] = [x.clone() if isinstance(x, Tensor) else x for x in args]
    got: list[Any] = [guards.copy(x.to(DEVICE)) if isinstance(x, Tensor) else x for x in args]
    assert verification.commit(*got) is None
    guards.check()
    reference.commit(*wanted)
    for number, (x, y) in enumerate(zip(got[:-1], wanted[:-1])):
        assert torch.equal(x.cpu(), y), f"argument {number}"


@pytest.mark.parametrize("sets", [0, 1, 2, 3])
@pytest.mark.parametrize(("batch", "window"), [(1, 1), (5, 3), (16, 2), (2, 33), (3, 128)])
def test_commit(batch: int, window: int, sets: int) -> None:
    for seed in range(3):
        assert_commits_alike(commit_case(batch, window, sets, seed))


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(0, 4), window=st.integers(1, 9), sets=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_commit_for_any_state(batch: int, window: int, sets: int, seed: int) -> None:
    if batch:
        assert_commits_alike(commit_case(batch, window, sets, seed))
    else:
        args = [x[:0] if isinstance(x, Tensor) else x for x in commit_case(1, window, sets, seed)]
        verification.commit(*on_device(args))


def test_a_row_that_is_done_stays_as_it_is() -> None:
    args = on_device(commit_case(4, 5, 2, 0))
    args[1][:], args[2][:], args[6][:] = 0, -1, 1
    before = [x.clone() if isinstance(x, Tensor) else x for x in args]
    for _ in range(3):
        verification.commit(*args)
    assert all(torch.equal(x, y) for x, y in zip(args[:-1], before[:-1]))


# -------------------------------------------------------------------- contracts


@every_rule
def test_contract_of_verify_with_pytorch(rule: int) -> None:
    with backend("triton"):
        torch.library.opcheck(torch.ops.sjd2.verify, on_device(arguments("verify", rule)))


def test_contract_of_commit_with_pytorch() -> None:
    with backend("triton"):
        torch.library.opcheck(torch.ops.sjd2.commit, on_device(arguments("commit")))


def test_what_they_do_not_serve() -> None:
    for index, change, message in [
        (0, lambda x: x.int(), "tokens is torch.int32"),
        (1, lambda x: x.double(), "p is torch.float64"),
        (4, lambda x: x[:, :-1], "q has shape"),
        (3, lambda x: x.T.contiguous().T, "drafts has strides"),
        (7, lambda x: x[::2], "forced has strides"),
    ]:
        args = list(arguments("verify"))
        args[index] = change(args[index])
        with pytest.raises(NotSupported, match=message):
            verification.verify(*args)
    for index, message in [(0, "decided"), (3, "tokens"), (5, "steps"), (9, "histogram")]:
        args = list(arguments("commit"))
        before = [x.clone() if isinstance(x, Tensor) else x for x in args]
        args[index] = args[index].double()
        with pytest.raises(NotSupported, match=f"{message} is torch.float64"):
            verification.commit(*args)
        assert all(torch.equal(x, y) for n, (x, y) in enumerate(zip(args, before)) if n != index and n < 11)


# -------------------------------------------------------------------- whole decodes

DECODERS = [
    {"decoder": "ar"},
    {"decoder": "jacobi"},
    {"decoder": "sjd"},
    {"decoder": "coupled", "coupling": "maximal"},
    {"decoder": "coupled", "coupling": "gumbel"},
    {"decoder": "sjd2"},
    {"decoder": "sjd2", "verification": "ratio", "coupling": "maximal"},
    {"decoder": "sjd2", "verification": "ratio", "coupling": "none", "warmup": "noise", "denoise_levels": 2},
    {"decoder": "sjd2", "verification": "paper", "coupling": "none"},
    {"decoder": "sjd", "temperature": 0.0},
]


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: "-".join(map(str, case.values())))
def test_whole_decodes_write_the_same_tokens(case: dict[str, Any]) -> None:
    """Every decoder, step by step, on a toy model with guidance and truncation: the same run as on the reference."""
    if DEVICE != "cpu":
        pytest.skip("the toy model lives on the CPU")
    model = PrefixModel(TokenLayout([-1, -1, 4, -1, -1]), vocab=4)
    config = DecodeConfig(**{"window": 3, "guidance_scale": 1.5, "temperature": 0.9, "top_k": 3, "top_p": 0.9} | case)
    prompt, seeds = torch.arange(3) % 2, range(3)
    runs = {}
    for name in ("reference", "triton"):
        with backend(name):
            runs[name] = decode(model, config, prompt, seeds, model.unconditional())
    expected, got = runs["reference"], runs["triton"]
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.steps, expected.steps) and torch.equal(got.histogram, expected.histogram)
