"""The C core's verify, commit and refine against the reference, and what must not change any answer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import Guards
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import counters, guarded, verify_arguments, window_state
from test_ops import arguments
from torch import Tensor

from sjd2_kernels import build, reference

native: Any = pytest.importorskip(
    "sjd2_kernels.native", reason=build.why_unusable() or "the C core is not there", exc_type=ImportError
)

NAN = float("nan")


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# -------------------------------------------------------------------- verify, commit, refine


STATES = st.tuples(
    st.integers(0, 2**31), st.integers(0, 4), st.integers(1, 9), st.sampled_from([1, 2, 5, 70, 130]), st.integers(1, 12)
)


@settings(max_examples=150, deadline=None)
@given(STATES, st.sampled_from([reference.MATCH, reference.RATIO, reference.COUPLED, reference.PAPER]), st.booleans())
def test_verify_commit_and_refine_follow_the_reference(shape: tuple[int, ...], rule: int, noisy: bool) -> None:
    state = window_state(*shape)
    args = verify_arguments(state, rule)
    decided = guarded(native.verify, *args)
    wanted = reference.verify(*args)
    for got, expected in zip(decided, wanted):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    check_commit(state, wanted)
    check_refine(state, wanted, rule, noisy)


def check_commit(state: dict[str, Any], verified: tuple[Tensor, ...]) -> None:
    decided, accepted, _, fault = verified
    batch = len(decided)

    def run(op: Callable[..., None]) -> list[Tensor]:
        guards = Guards()
        make = torch.Generator().manual_seed(1)
        written = [
            torch.randint(-1, 5, (batch, state["padded"]), generator=make), state["lengths"], state["steps"],
            state["done"], torch.full((batch,), -1).int(), torch.full((batch,), -1).int(), state["histogram"],
            torch.arange(2 * batch).int(),
        ]  # fmt: skip
        copies = [guards.copy(tensor) for tensor in written]
        op(decided, accepted, fault, *copies, state["total"])
        guards.check()
        return copies

    for got, expected in zip(run(native.commit), run(reference.commit)):
        assert torch.equal(got, expected)


def check_refine(state: dict[str, Any], verified: tuple[Tensor, ...], rule: int, noisy: bool, dim: int = 70) -> None:
    decided, accepted, settled, _ = verified
    make, (batch, window), vocab = state["make"], decided.shape, state["p"].shape[-1]
    lengths = state["lengths"] + accepted
    table, mean, std = torch.randn(vocab + 1, dim, generator=make), torch.randn(dim), torch.rand(dim) + 0.5
    directions = torch.nn.functional.normalize((table[:vocab] - mean) / std, dim=-1)
    embeddings = torch.randn(batch, window - 1, dim, generator=make)
    noise = torch.randn(batch, state["padded"], dim) if state["seeds"].numel() % 2 else None
    constants = table, mean, std, torch.tensor([0.0, 0.4, 0.7]), noise, directions if rule == reference.PAPER else None
    q = state["q"] if rule != reference.MATCH else torch.empty(batch, window - 1, 0)

    def run(op: Callable[..., None]) -> list[Tensor]:
        guards = Guards()
        written = [state["drafts"], state["status"], state["levels"], q, *([embeddings] if noisy else [])]
        copies = [guards.copy(tensor) for tensor in written]
        held = copies if noisy else [*copies, None]
        op(
            decided, state["p"], accepted, settled, lengths, state["forced"], state["initial"], *held,
            *(constants if noisy else [None] * 6), state["seeds"], 2 if noisy else -1,
        )  # fmt: skip
        guards.check()
        return copies

    for got, expected in zip(run(native.refine), run(reference.refine)):
        if got.is_floating_point():
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got, expected)


def test_replacements_over_many_draws() -> None:
    """Thousands of residual draws: the tokens of the reference but for near-ties."""
    state = window_state(3, 16, 65, 600, 80)
    state["status"].fill_(reference.TRACKED)
    state["levels"].fill_(-1)
    args = verify_arguments(state, reference.COUPLED)
    got, wanted = native.verify(*args)[0], reference.verify(*args)[0]
    assert int((got != wanted).sum()) <= 1


@pytest.mark.parametrize("rule", [reference.RATIO, reference.COUPLED, reference.PAPER])
def test_p_and_q_that_are_equal_zero_or_not_numbers(rule: int) -> None:
    state = window_state(5, 3, 9, 70, 12)
    state["status"].fill_(reference.TRACKED)
    for name in ("levels", "forced"):
        state[name].fill_(-1)
    for name in ("done", "lengths"):
        state[name].zero_()
    p, q, drafts = state["p"], state["q"], state["drafts"]
    q[:, 0] = p[:, 0]
    q[:, 1].scatter_(-1, drafts[:, 1, None], 0.0)
    p[:, 2] = q[:, 2] = 0.0
    p[:, 3] = NAN
    q[:, 4, 5] = NAN
    p[:, 5, 69] = NAN
    p[:, 6].scatter_(-1, drafts[:, 6, None], 0.0)
    for row in range(3):
        p[row], q[row] = p[row].roll(row * 3, 0), q[row].roll(row * 3, 0)
    for got, wanted in zip(
        native.verify(*verify_arguments(state, rule)), reference.verify(*verify_arguments(state, rule))
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_refine_reads_half_tables(dtype: torch.dtype) -> None:
    results = []
    for op in (native.refine, reference.refine):
        values = list(arguments("refine"))
        values[12] = values[12].to(dtype)
        op(*values)
        results.append(values[7:12])
    for got, wanted in zip(*results):
        assert torch.allclose(got.float(), wanted.float(), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- one answer everywhere


def large_run() -> list[Tensor]:
    """Outputs of all ops, large enough for several threads."""
    torch.manual_seed(0)
    window, vocab, dim = 24, 5000, 1500
    logits = torch.randn(2, 1, window, vocab) * 2
    tokens, p, bad = native.sample_window(logits, *counters(1), None, 3.0, 0.9, 1500, 0.95, 0, vocab, True, True)
    state = window_state(1, 1, window, vocab, 40)
    state |= {"tokens": tokens, "p": p, "bad": bad}
    verified = native.verify(*verify_arguments(state, reference.COUPLED))
    q, noisy, levels = state["q"].clone(), torch.randn(1, window - 1, dim), state["levels"].clone()
    table, mean, std, ratios = (
        torch.randn(vocab + 1, dim),
        torch.randn(dim),
        torch.rand(dim) + 0.5,
        torch.tensor([0.0, 0.5, 0.7]),
    )
    directions = torch.nn.functional.normalize(table[:vocab], dim=-1)
    native.refine(
        verified[0], p, verified[1], verified[2], state["lengths"], state["forced"], state["initial"], state["drafts"],
        state["status"], levels, q, noisy, table, mean, std, ratios, None, directions, state["seeds"], 2,
    )  # fmt: skip
    every = torch.cat((torch.full((1, 1), -1).int(), levels), 1)
    embeds = native.embed_window(tokens, every, table, table[:1], noisy, mean, std)
    other = native.perturb(embeds, every.abs(), tokens, state["seeds"], mean, std, ratios, 3, True)
    return [tokens, p, *verified, q, noisy, levels, state["drafts"], embeds, other]


def test_threads_change_nothing(threads: None) -> None:
    got = large_run()
    torch.set_num_threads(5)
    for one, other in zip(got, large_run()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [128, 256])
def test_vector_widths_change_nothing(width: int, tmp_path: Path) -> None:
    """Bit for bit the same on a processor with narrower vectors."""
    sources = build.source_directory()
    assert sources is not None
    library = tmp_path / "narrow.so"
    units = [sources / unit for unit in build.UNITS]
    build.run_compiler(build.compile_command(library, units, [*build.FLAGS, f"-DSJD2_MAX_WIDTH={width}"], sources))
    wide = large_run()
    narrow = ctypes.CDLL(str(library))
    narrow.sjd2_instruction_set.restype = ctypes.c_char_p
    assert narrow.sjd2_instruction_set().decode() in ("baseline", "avx2" if width == 256 else "baseline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_call", native.functions(narrow))
        for one, other in zip(wide, large_run()):
            assert torch.equal(one, other)
