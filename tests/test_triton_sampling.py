"""Triton `sample_window` and the draws of `philox` against the reference: on a GPU, else in the interpreter.

Draws are compared token by token. Logits and noise may differ from the reference by an ulp, so a token may differ
where the two best scores are closer than `NEAR`; such slots are counted. The same holds for a nucleus whose edge
is closer than that to `top_p`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from guarded import Guards
from test_ops import arguments
from torch import Tensor
from triton_mode import DEVICE

from sjd2_kernels import backend, reference, rng
from sjd2_kernels.dispatch import NotSupported
from sjd2_kernels.reference import decoding

sampling = pytest.importorskip("sjd2_kernels.sampling", reason="triton is not installed", exc_type=ImportError)
philox = pytest.importorskip("sjd2_kernels.philox")
split = pytest.importorskip("sjd2_kernels.sampling_split")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

# NaN and infinities are part of what is tested; the interpreter's numpy speaks of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")
NEAR = 1e-5


class Options(NamedTuple):
    """The scalars of sample_window, in its order."""

    guidance: float = 3.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    begin: int = 0
    end: int = 2**30
    per_position: bool = False
    need_p: bool = True

    def after(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """All arguments: the tensors, then these."""
        return (*tensors, *self)


def random_logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul(3).to(dtype)


def counters(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """seeds (one above 2³²), lengths, steps."""
    rows = torch.arange(batch)
    return rows * (2**33 + 7) + 5, (rows * 3).int(), (rows + 2).int()


def sample(
    monkeypatch: pytest.MonkeyPatch, logits: Tensor, options: Options, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's outputs on the CPU; whatever it allocates is poisoned, and guarded on both sides."""
    guards = Guards()
    tensors: list[Any] = [x if x is None else x.to(DEVICE) for x in (logits, *counters(logits.shape[-3]), noise)]
    before: list[Any] = [x if x is None else x.clone() for x in tensors]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda shape, dtype, device: guards.empty(shape, dtype, device))
        tokens, p, bad = sampling.sample_window(*options.after(*tensors))
    guards.check()
    for x, y in zip(tensors, before):
        assert x is None or torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was changed"
    assert (tokens.dtype, p.dtype, bad.dtype) == (torch.int64, torch.float32, torch.bool)
    return tokens.cpu(), p.cpu(), bad.cpu()


def expected(logits: Tensor, options: Options, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return reference.sample_window(*options.after(logits, *counters(logits.shape[-3]), noise))


def scores(logits: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Logits as the reference truncates them, and what it takes the argmax of."""
    x = decoding._guided(logits, options.guidance)
    ids = torch.arange(x.shape[-1])
    x = x.masked_fill((ids < options.begin) | (ids >= options.end), -INF)
    if options.temperature == 0.0:
        return x, x
    seeds, lengths, steps = counters(x.shape[0])
    positions = lengths[:, None] + torch.arange(x.shape[1])
    drawn = rng.gumbel(seeds, positions, 0 if options.per_position else steps + 1, rng.SAMPLE, x.shape[-1])
    x = x / options.temperature
    return x, decoding._truncated(x, options.top_k, options.top_p) + drawn


def assert_nearly(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], logits: Tensor, options: Options) -> None:
    """Bad flags and sizes equal; tokens and nuclei equal but for near ties, which are rare; p to rounding."""
    x, score = scores(logits, options)
    assert torch.equal(got[2], wanted[2]) and got[1].shape == wanted[1].shape
    sure = torch.ones_like(got[2])
    if options.top_p < 1.0 and options.need_p:
        truncated = decoding._truncated(x, options.top_k, 1.0).double().softmax(-1)
        order = truncated.sort(-1, descending=True)
        above = torch.empty_like(truncated).scatter(-1, order.indices, order.values.cumsum(-1) - order.values)
        differs = (got[1] > 0) != (wanted[1] > 0)
        assert bool(((above - options.top_p).abs()[differs] < NEAR).all()), "another nucleus"
        sure = ~differs.any(-1)
    if score.shape[-1] > 1:
        best = score.topk(2).values
        sure &= best[..., 0] - best[..., 1] > NEAR
    assert int((~sure).sum()) <= 1 + sure.numel() // 50, "too many near ties to call this a comparison"
    assert torch.equal(got[0][sure], wanted[0][sure])
    if options.need_p:
        torch.testing.assert_close(got[1][sure], wanted[1][sure], rtol=2e-5, atol=1e-7)


# -------------------------------------------------------------------- random numbers


@triton.jit
def _draws(seeds_ptr, out_ptr, position, iteration, COUNT: tl.constexpr):
    row = tl.program_id(0)
    seed = tl.load(seeds_ptr + row)
    lanes, at = 5 + tl.arange(0, COUNT // 4), out_ptr + row * 3 * COUNT + tl.arange(0, COUNT)
    tl.store(at, philox.uniforms(seed, position, iteration, philox.ACCEPT, lanes))
    tl.store(at + COUNT, philox.gumbels(seed, position, iteration, philox.SAMPLE, lanes))
    tl.store(at + 2 * COUNT, philox.normals(seed, position, iteration, lanes))


@pytest.mark.parametrize("position, iteration", [(0, 0), (5, 3), (2**31 - 1, 77)])
def test_draws_are_those_of_rng(position: int, iteration: int) -> None:
    seeds, count = torch.tensor([0, 5, 2**32, 2**40 + 1, 2**63 - 1]), 8192
    out = torch.full((len(seeds), 3, count), NAN, device=DEVICE)
    _draws[(len(seeds),)](seeds.to(DEVICE), out, position, iteration, count)  # pyright: ignore[reportArgumentType]
    at, end = torch.full((len(seeds), 1), position), count + 20
    uniform, gumbel, normal = (part[:, 0, 20:] for part in (
        rng.uniforms(seeds, at, iteration, rng.ACCEPT, end),
        rng.gumbel(seeds, at, iteration, rng.SAMPLE, end),
        rng.normals(seeds, at, iteration, end),
    ))  # fmt: skip
    got = out.cpu()
    assert torch.equal(got[:, 0], uniform)
    torch.testing.assert_close(got[:, 1], gumbel, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, 2], normal, rtol=1e-6, atol=1e-6)


@triton.jit
def _exponentials(u_ptr, out_ptr, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    tl.store(out_ptr + lanes, philox.exponential(tl.load(u_ptr + lanes)))


def test_exponential_is_exact_for_small_uniforms() -> None:
    """A float32 logarithm of 1 − u would lose all of u below 2⁻²⁵: large Gumbel values would be lumped together."""
    u = torch.cat((torch.tensor([0.0, 1 - 2.0**-24]), 2.0 ** -torch.linspace(0.01, 32, 510))).to(DEVICE)
    got = torch.empty_like(u)
    _exponentials[(1,)](u, got, 512)  # pyright: ignore[reportArgumentType]
    exact = -torch.log1p(-u.double().clamp(min=2.0**-33))
    assert float(((got - exact) / exact).abs().max()) < 3e-7


# -------------------------------------------------------------------- against the reference

CASES = [  # ([sets,] B, W, V), dtype, options
    ((1, 1, 1), torch.float32, Options()),
    ((2, 2, 3, 5), torch.float32, Options(temperature=0.7)),
    ((3, 1, 257), torch.float16, Options(temperature=1.3, top_k=40)),
    ((2, 2, 7, 1000), torch.bfloat16, Options(top_k=100, top_p=0.9)),
    ((2, 16, 2, 33), torch.float32, Options(guidance=-1.5, top_p=0.6, per_position=True)),
    ((2, 1, 48, 512), torch.bfloat16, Options(top_k=50, per_position=True)),
    ((1, 9, 1000), torch.float32, Options(top_p=0.95, begin=17, end=900)),
    ((2, 2, 3, 3000), torch.float16, Options(begin=2000, end=2001, need_p=False)),
    ((1, 128, 64), torch.float32, Options(need_p=False)),
    ((2, 1, 4, 8192), torch.float32, Options(temperature=0.9, top_k=2000, top_p=0.8)),
    ((2, 1, 2, 32768), torch.bfloat16, Options(top_k=2048)),
    ((2, 2, 4, 1000), torch.float32, Options(temperature=0.0)),
    ((1, 5, 777), torch.bfloat16, Options(temperature=0.0, begin=100, end=300, need_p=False)),
]
CASES_OF_MANY = [
    ((1, 1, 1), torch.float32, Options(top_k=1)),
    ((2, 2, 3, 1000), torch.float32, Options(temperature=0.7)),
    ((3, 1, 257), torch.float16, Options(temperature=1.3, top_k=40, need_p=False)),
    ((2, 1, 4, 700), torch.bfloat16, Options(top_k=100, top_p=0.9, per_position=True)),
    ((1, 3, 1000), torch.float32, Options(top_p=0.95, begin=17, end=900)),
    ((2, 2, 4, 1000), torch.float32, Options(temperature=0.0)),
    ((1, 5, 777), torch.bfloat16, Options(temperature=0.0, begin=100, end=300, need_p=False)),
]


def name(case: Any) -> str:
    return "-".join(map(str, case)) if isinstance(case, tuple) else str(case)


@pytest.mark.parametrize("shape, dtype, options", CASES, ids=name)
def test_sample_window(
    shape: tuple[int, ...], dtype: torch.dtype, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(*shape, dtype=dtype)
    got, wanted = sample(monkeypatch, logits, options), expected(logits, options)
    assert_nearly(got, wanted, logits, options)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any length take the path of long rows, in several chunks."""
    monkeypatch.setattr(sampling, "ONE_BLOCK", 0)
    monkeypatch.setattr(split, "CHUNK", {"BLOCK": 128, "num_warps": 4})
    monkeypatch.setattr(split, "ROW", {"BLOCK": 512, "num_warps": 4})


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape, dtype, options", CASES_OF_MANY, ids=name)
def test_rows_shared_by_programs(
    shape: tuple[int, ...], dtype: torch.dtype, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(*shape, dtype=dtype)
    got, wanted = sample(monkeypatch, logits, options), expected(logits, options)
    assert_nearly(got, wanted, logits, options)


@pytest.mark.parametrize(
    "vocab, options",
    [
        (184622, Options()),
        (184622, Options(begin=3, end=32000, top_k=2048)),
        (65536, Options(temperature=0.0)),
        pytest.param(40000, Options(top_k=1000), marks=pytest.mark.slow),
        pytest.param(65536, Options(top_p=0.9), marks=pytest.mark.slow),
    ],
    ids=name,
)
def test_large_vocabularies(vocab: int, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(2, 1, 2, vocab, dtype=torch.bfloat16)
    assert_nearly(sample(monkeypatch, logits, options), expected(logits, options), logits, options)


def test_a_table_holds_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, options = random_logits(2, 4, 300), Options(per_position=True)
    seeds = counters(2)[0]
    table = rng.gumbel(seeds, torch.arange(9).expand(2, -1), 0, rng.SAMPLE, 300)
    drawn = sample(monkeypatch, logits, options)
    looked_up = sample(monkeypatch, logits, options, table)
    assert torch.equal(drawn[0], looked_up[0]) and torch.equal(drawn[1], looked_up[1])
    assert torch.equal(looked_up[0], expected(logits, options, table)[0])
    loud = torch.zeros_like(table)
    loud[:, :, 7] = 100.0  # the table is what decides
    assert bool((sample(monkeypatch, logits, options, loud)[0] == 7).all())
    unkeyed = options._replace(per_position=False)  # where noise is not keyed by position, a table says nothing
    assert torch.equal(sample(monkeypatch, logits, unkeyed, loud)[0], expected(logits, unkeyed)[0])


def test_a_row_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, options = random_logits(2, 3, 4, 700), Options(temperature=0.8, top_k=300, top_p=0.9)
    tokens, p, _ = sample(monkeypatch, logits, options)
    seeds, lengths, steps = (x.to(DEVICE) for x in counters(3))
    for row in range(3):
        one = slice(row, row + 1)
        alone = logits[:, one, 1:3].contiguous().to(DEVICE)
        args = options.after(alone, seeds[one], lengths[one] + 1, steps[one], None)
        got = sampling.sample_window(*args)
        assert torch.equal(got[0].cpu(), tokens[one, 1:3]) and torch.equal(got[1].cpu(), p[one, 1:3])


def test_empty_batch() -> None:
    for options in (Options(), Options(need_p=False)):
        args = options.after(torch.empty(0, 3, 5), *counters(0), None)
        got = sampling.sample_window(*[x.to(DEVICE) if isinstance(x, Tensor) else x for x in args])
        assert [x.shape for x in got] == [x.shape for x in reference.sample_window(*args)]


# -------------------------------------------------------------------- edges

paths = pytest.mark.parametrize("path", ["one_program", "many_programs"])


@pytest.fixture
def path_of(request: pytest.FixtureRequest, path: str) -> None:
    if path == "many_programs":
        request.getfixturevalue("small_chunks")


@pytest.mark.usefixtures("path_of")
@paths
@pytest.mark.parametrize("top_k", [1, 2, 17, 99, 100])
def test_top_k_keeps_ties(top_k: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few distinct values, so the k-th is tied nearly everywhere; zeros of both signs; rows with masked ids."""
    logits = torch.randint(-3, 4, (2, 3, 100), generator=torch.Generator().manual_seed(top_k)).float()
    logits[0, 0, ::2] *= -0.0
    logits[1, :, 30:] = -INF
    options = Options(top_k=top_k)
    got, wanted = sample(monkeypatch, logits, options), expected(logits, options)
    assert torch.equal(got[1] > 0, wanted[1] > 0)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("path_of")
@paths
@pytest.mark.parametrize("top_p", [1e-9, 0.25, 0.5, 0.75, 0.999999])
def test_top_p_at_its_edges(top_p: float, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four equal weights, exact in float32, and a tail: 0.25 lies on an edge, and ties stay together."""
    logits = torch.full((1, 2, 200), -INF)
    logits[0, 0, [3, 20, 164, 199]] = 0.0
    logits[0, 1, :3] = torch.tensor([0.5, 0.25, 0.25]).log()
    options = Options(top_p=top_p)
    got, wanted = sample(monkeypatch, logits, options), expected(logits, options)
    assert torch.equal(got[1] > 0, wanted[1] > 0)
    assert torch.equal(got[0], wanted[0])
    assert int((got[1][0, 0] > 0).sum()) == 4  # all equal: no cut parts them


BAD = {
    "nan": {7: NAN},
    "nan twice": {70: NAN, 190: NAN},
    "inf": {11: INF},
    "inf then nan": {11: INF, 171: NAN},
    "nan masked by the range": {1: NAN},
    "nothing finite": dict.fromkeys(range(200), -INF),
    "one finite": {i: -INF for i in range(200) if i != 166},
}


@pytest.mark.usefixtures("path_of")
@paths
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(
    "options", [Options(), Options(temperature=0.0), Options(top_k=9), Options(top_p=0.5), Options(top_k=9, top_p=0.5)],
    ids=["plain", "greedy", "top_k", "top_p", "both"],
)  # fmt: skip
def test_bad_logits(options: Options, sets: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's tokens, p and flags also in rows that are lost; good rows beside them stay good."""
    logits = random_logits(2, 1, len(BAD) + 1, 200)
    for slot, cells in enumerate(BAD.values()):
        for position, value in cells.items():
            logits[position % 2, 0, slot, position] = value  # in either set
    logits = logits[0] if sets == 1 else logits
    options = options._replace(begin=5, end=198, temperature=options.temperature * 0.7)
    got, wanted = sample(monkeypatch, logits, options), expected(logits, options)
    assert bool(wanted[2].any()) and not bool(wanted[2][0, -1])
    assert torch.equal(got[2], wanted[2])
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.usefixtures("path_of")
@paths
def test_greedy_takes_the_first_of_equal_logits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 3, 200)
    logits[0, 0, [50, 130]] = 2.0
    logits[0, 1] = -0.0
    logits[0, 1, 100:] = 0.0  # equal to −0.0
    logits[0, 2, 199] = 1e-30
    tokens, p, _ = sample(monkeypatch, logits, Options(temperature=0.0))
    assert tokens.tolist() == [[50, 0, 199]] == logits.argmax(-1).tolist()
    assert torch.equal(p, torch.nn.functional.one_hot(tokens, 200).float())


# -------------------------------------------------------------------- contracts


@pytest.mark.parametrize("options", [Options(), Options(temperature=0.0, need_p=False)])
def test_contract_with_pytorch(options: Options) -> None:
    args = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments("sample_window")]
    with backend("triton"):
        torch.library.opcheck(torch.ops.sjd2.sample_window, (*args[:5], *options))


def test_what_it_does_not_serve() -> None:
    logits, (seeds, lengths, steps) = random_logits(2, 2, 3, 8), counters(2)
    for wrong, message in [
        (Options().after(logits.double(), seeds, lengths, steps, None), "float64"),
        (Options().after(logits, seeds[:1], lengths, steps, None), "seeds has shape"),
        (Options().after(logits[..., ::2], seeds, lengths, steps, None), "strides"),
        (Options().after(logits[:1], seeds, lengths, steps, None), "logits have shape"),
        (Options().after(logits, seeds, lengths.long(), steps, None), "lengths is torch.int64"),
        (Options().after(logits, seeds, lengths, steps, logits[0, :, :, :7]), "noise has shape"),
        (Options(top_p=0.0).after(logits, seeds, lengths, steps, None), "top_p"),
    ]:
        with pytest.raises(NotSupported, match=message):
            sampling.sample_window(*wrong)
    args = Options().after(*(x.to(DEVICE) for x in (logits[..., ::2], seeds, lengths, steps)), None)
    with backend("triton"):
        got = torch.ops.sjd2.sample_window(*args)
    assert torch.equal(got[0], reference.sample_window(*args)[0])
