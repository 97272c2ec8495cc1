"""Attention backends: each against float64, the merge of a timestep key, who is chosen and why.

flash-attn and PyTorch's varlen_attn need a GPU. Here functions of their signatures stand in for them, computed in
PyTorch, that check what they are given; the real ones are compared on a GPU only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from precision import assert_as_close_as_plain
from torch import Tensor
from triton_mode import DEVICE

from sjd2_engine import Engine
from sjd2_engine.attention import BACKENDS, Pass, Workload, check_name, choose, flash, merge_extra_key, sdpa, survey
from sjd2_engine.errors import BackendError, ConfigError
from sjd2_kernels import backend as ops_on

HALVES = (torch.float16, torch.bfloat16)
HOPPER = Workload(torch.device("cuda"), torch.bfloat16, 32, 8, 128, capability=(9, 0))
AMPERE = replace(HOPPER, capability=(8, 0))
CPU = Workload(torch.device("cpu"), torch.float32, 32, 8, 128)


@dataclass(frozen=True)
class Case:
    """Sizes of a call; `lengths` gives the rows."""

    width: int
    heads: int
    kv_heads: int
    dim: int
    front: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"T{self.width}-H{self.heads}on{self.kv_heads}-d{self.dim}-front{self.front}-{self.lengths}"

    def workload(self, dtype: torch.dtype, device: str = DEVICE) -> Workload:
        capability = (9, 0) if device == "cuda" else None
        return Workload(torch.device(device), dtype, self.heads, self.kv_heads, self.dim, self.front > 0, capability)


CASES = [
    Case(1, 4, 4, 16, 0, (0, 60, 7)),
    Case(1, 6, 2, 24, 3, (40, 0)),
    Case(16, 4, 2, 32, 2, (33, 5)),
    Case(33, 4, 1, 64, 4, (0, 30)),
    Case(130, 2, 2, 8, 2, (0, 50)),  # more queries than a window has, as in a prefill
]


def arguments(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Pass]:
    """Random queries, keys, values; what no query may see is large, as stale entries are finite."""
    generator = torch.Generator().manual_seed(0)
    rows, slots = len(case.lengths), case.front + max(case.lengths) + case.width + 5
    q = torch.randn(rows, case.width, case.heads, case.dim, generator=generator)
    caches = torch.randn(2, rows, slots, case.kv_heads, case.dim, generator=generator)
    for row, length in enumerate(case.lengths):
        caches[:, row, case.front + length + case.width :] = 300.0
    levels = torch.randint(-1, max(case.front, 1), (rows, case.width), dtype=torch.int32, generator=generator)
    keys, values = caches.to(DEVICE, dtype)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE)
    timed = levels.to(DEVICE) if case.front else None
    return q.to(DEVICE, dtype), keys, values, Pass(lengths, timed, case.width, slots, case.front, case.dim**-0.5)


def plain(q: Tensor, keys: Tensor, values: Tensor, call: Pass, dtype: torch.dtype) -> Tensor:
    """Softmax attention written out, in `dtype`."""
    slot = torch.arange(call.slots, device=q.device)
    seen = (slot >= call.front) & (
        slot <= call.front + call.lengths[:, None, None] + torch.arange(call.width, device=q.device)[:, None]
    )
    if call.levels is not None:
        seen |= (slot < call.front) & (slot == call.levels[..., None])
    group = q.shape[2] // keys.shape[2]
    q, keys, values = (
        q.to(dtype),
        keys.to(dtype).repeat_interleave(group, 2),
        values.to(dtype).repeat_interleave(group, 2),
    )
    logits = torch.einsum("rthd,rshd->rhts", q, keys) * call.scale
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rhts,rshd->rthd", weights, values)


def flash_rows(q: Tensor, keys: Tensor, values: Tensor, used: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What flash attention gives: out [R, T, H, d] in q's dtype and lse float32 [R, H, T]; causal, bottom right."""
    slot, step = torch.arange(keys.shape[1]), torch.arange(q.shape[1])
    seen = slot <= (used[:, None] - q.shape[1] + step)[..., None]
    group = q.shape[2] // keys.shape[2]
    keys, values = (x.float().repeat_interleave(group, 2) for x in (keys, values))
    logits = torch.einsum("rthd,rshd->rhts", q.float(), keys) * scale
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    return torch.einsum("rhts,rshd->rthd", logits.softmax(-1), values).to(q.dtype), logits.logsumexp(-1)


def check_flash(q: Tensor, k_cache: Tensor, cache_seqlens: Any, causal: bool, num_splits: int) -> None:
    """What the library asks of its arguments, and we of the call."""
    assert q.dtype == k_cache.dtype and q.dtype in HALVES
    assert q.stride(-1) == k_cache.stride(-1) == 1
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (q.shape[0],)
    assert bool((cache_seqlens <= k_cache.shape[1]).all()) and causal
    assert num_splits >= 1, "the library would choose by the batch and the device"


def flash_2(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens: Any = None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale: Any = None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    """Signature of flash-attn 2."""
    check_flash(q, k_cache, cache_seqlens, causal, num_splits)
    out, lse = flash_rows(q, k_cache, v_cache, cache_seqlens, softmax_scale)
    return (out, lse) if return_softmax_lse else out


def flash_3(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens: Any = None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale: Any = None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """Signature of flash-attn 3, whose partial results follow the log-sum-exp."""
    check_flash(q, k_cache, cache_seqlens, causal, num_splits)
    out, lse = flash_rows(q, k_cache, v_cache, cache_seqlens, softmax_scale)
    return (out, lse, None, None) if return_softmax_lse else out


def install(patch: pytest.MonkeyPatch, name: str, function: Callable[..., Any] | None) -> None:
    """Put a library in place of `name`, or make it one that is not installed."""
    module = ModuleType(name)
    if function is not None:
        module.flash_attn_with_kvcache = function  # pyright: ignore[reportAttributeAccessIssue]
    patch.setitem(sys.modules, name, module if function is not None else None)  # pyright: ignore[reportArgumentType]
    flash.find.cache_clear()


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Neither version is installed, whatever the machine has; hands out the means to install one."""
    with monkeypatch.context() as patch:
        install(patch, "flash_attn", None)
        install(patch, "flash_attn_interface", None)
        yield patch
    flash.find.cache_clear()


def varlen_stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> Any:
    """PyTorch's varlen_attn, row by row from the flat tensors."""
    assert query.dtype in HALVES and cu_seq_q.dtype == cu_seq_k.dtype == options["seqused_k"].dtype == torch.int32
    assert options["window_size"] == (-1, 0) and options["num_splits"] == 1
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    outs, masses = [], []
    for row, used in enumerate(options["seqused_k"].tolist()):
        queries = slice(*cu_seq_q[row : row + 2].tolist())
        first, last = cu_seq_k[row : row + 2].tolist()
        assert 0 < used <= min(last - first, max_k) and queries.stop - queries.start <= max_q
        keys, values = key[None, first : first + used], value[None, first : first + used]
        out, lse = flash_rows(query[None, queries], keys, values, torch.tensor([used]), options["scale"])
        outs.append(out[0])
        masses.append(lse[0])
    flat = torch.cat(outs)
    return (flat, torch.cat(masses, 1)) if options["return_aux"].lse else flat  # lse [H, T]


def assert_close_to_float64(name: str, case: Case, dtype: torch.dtype, device: str = DEVICE) -> None:
    q, keys, values, call = arguments(case, dtype)
    before = keys.clone(), values.clone()
    got = BACKENDS[name].prepare(case.workload(dtype, device), call)(q, keys, values)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])
    exact = plain(q, keys, values, call, torch.float64)
    assert_as_close_as_plain(got, plain(q, keys, values, call, dtype), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["cpu", "sdpa", "triton"])
def test_backends_of_this_machine(name: str, case: Case, dtype: torch.dtype) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    if name == "cpu" and DEVICE != "cpu":
        pytest.skip("reads lengths on the host")
    with ops_on("triton"):
        able, why = BACKENDS[name].available(case.workload(dtype))
        assert able, why
        assert_close_to_float64(name, case, dtype)


@pytest.mark.skipif(DEVICE != "cpu", reason="the real ones run here")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("library", ["flash_attn", "flash_attn_interface"])
def test_flash(library: str, case: Case, dtype: torch.dtype, no_flash: pytest.MonkeyPatch) -> None:
    install(no_flash, library, {"flash_attn": flash_2, "flash_attn_interface": flash_3}[library])
    assert flash.FlashAttention().version(case.workload(dtype, "cuda")) == {"flash_attn": 2}.get(library, 3)
    assert_close_to_float64("flash", case, dtype, "cuda")


@pytest.mark.skipif(DEVICE != "cpu", reason="the real one runs here")
@pytest.mark.skipif(bool(sdpa._missing()), reason=f"varlen_attn has no {sdpa._missing()}")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_varlen(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen  # not above: it loads Triton, and the interpreter must be chosen first

    signature = inspect.signature(varlen.varlen_attn)

    def checked(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return varlen_stand_in(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", checked)
    assert BACKENDS["sdpa"].returns_lse(case.workload(dtype, "cuda"))
    assert_close_to_float64("sdpa", case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["triton", "flash", "sdpa"])
def test_every_backend_on_a_gpu_also_captured(name: str, case: Case) -> None:
    capability = torch.cuda.get_device_capability()
    workload = replace(case.workload(torch.bfloat16), capability=capability)
    able, why = BACKENDS[name].available(workload)
    if not able:
        pytest.skip(why)
    q, keys, values, call = arguments(case, torch.bfloat16)
    eager = BACKENDS[name].prepare(workload, call)(q, keys, values)
    exact, same = (plain(q, keys, values, call, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_as_close_as_plain(eager, same, exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = BACKENDS[name].prepare(workload, call)(q, keys, values)
    call.lengths.sub_(call.lengths.clamp(max=3))
    graph.replay()
    assert torch.equal(out, BACKENDS[name].prepare(workload, call)(q, keys, values))
    assert_as_close_as_plain(
        out, plain(q, keys, values, call, torch.bfloat16), plain(q, keys, values, call, torch.float64)
    )


@pytest.mark.parametrize("name", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("front", [0, 3])
def test_no_pass_on_cuda_reads_from_the_device(name: str, dtype: torch.dtype, front: int) -> None:
    """On tensors without data every host read, and every shape that depends on data, is an error."""
    workload = replace(HOPPER, dtype=dtype, timesteps=front > 0)
    q = torch.empty(2, 16, 32, 128, dtype=dtype, device="meta")
    keys = torch.empty(2, 500, 8, 128, dtype=dtype, device="meta")
    levels = torch.empty(2, 16, dtype=torch.int32, device="meta")
    call = Pass(torch.empty(2, dtype=torch.int32, device="meta"), levels, 16, 500, front, 0.1)
    out = BACKENDS[name].prepare(workload, call)(q, keys, keys)
    assert out.shape == q.shape and out.dtype == dtype
    with pytest.raises(RuntimeError, match="meta"):
        call.lengths.max().item()


@pytest.mark.parametrize("boost", [1.0, 30.0])
def test_merge_of_an_extra_key(boost: float) -> None:
    """The extra key counts little, much, or for all; levels outside the keys that are there see none."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 6, 16, generator=generator) * boost
    keys, values = torch.randn(2, 2, 11, 3, 16, generator=generator)
    extra_keys, extra_values = torch.randn(2, 2, 4, 3, 16, generator=generator)
    levels = torch.tensor([[-1, 0, 1, 2, 3, 4, 9], [3, 3, -1, -1, 0, 0, -7]], dtype=torch.int32)

    def logits(x: Tensor) -> Tensor:
        return torch.einsum("rthd,rshd->rths", q.double(), x.double().repeat_interleave(2, 2)) * 0.25

    old, own = logits(keys), logits(extra_keys)
    own = own.masked_fill(levels[:, :, None, None] != torch.arange(4), float("-inf"))
    both = torch.cat([keys, extra_keys], 1), torch.cat([values, extra_values], 1).double()
    exact = torch.einsum("rths,rshd->rthd", torch.cat([old, own], 3).softmax(3), both[1].repeat_interleave(2, 2))
    out = torch.einsum("rths,rshd->rthd", old.softmax(3), values.double().repeat_interleave(2, 2))
    merged = merge_extra_key(out.float(), old.logsumexp(3).float(), q, extra_keys, extra_values, levels, scale=0.25)
    assert float((merged.double() - exact).abs().max()) < 3e-6 * boost
    assert float((merged.double() - out).abs()[levels >= 4].max()) < 1e-6
    assert float((merged.double() - out).abs()[:, 1].max()) > 1e-3


def test_choice_on_cuda(no_flash: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def auto(workload: Workload) -> str:
        return choose("auto", workload)[0].name

    assert auto(HOPPER) == auto(AMPERE) == auto(replace(HOPPER, dtype=torch.float32)) == "triton"
    assert auto(replace(HOPPER, head_dim=256)) == "sdpa"  # more dimensions than the kernel takes
    install(no_flash, "flash_attn", flash_2)
    assert auto(HOPPER) == "triton" and auto(replace(HOPPER, head_dim=256)) == "flash"
    install(no_flash, "flash_attn_interface", flash_3)
    assert auto(HOPPER) == "flash"
    assert auto(AMPERE) == "triton"  # version 3 is for Hopper
    assert auto(replace(HOPPER, timesteps=True)) == "triton"  # merging takes passes of its own
    with ops_on("reference"):
        assert auto(AMPERE) == "flash"
    assert choose("sdpa", HOPPER) == (BACKENDS["sdpa"], "asked for")
    taken = {row["backend"]: row["auto"] for row in survey(HOPPER)}
    assert taken["flash"].startswith("without timestep keys: ") and taken["triton"].startswith("with timestep keys")
    assert not taken["sdpa"] and not taken["cpu"]


def test_choice_on_the_cpu() -> None:
    assert choose("auto", CPU)[0].name == "cpu"
    assert [row["backend"] for row in survey(CPU) if row["available"]] == ["sdpa", "cpu"]
    assert [(row["backend"], row["auto"]) for row in survey(CPU) if row["auto"]] == [
        ("cpu", "always: the fastest on a CPU")
    ]
    assert all(row["why"] for row in survey(CPU))


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (HOPPER, r"No module|import of.*pip install 'sjd2-engine\[flash\]'"),
        (CPU, "needs CUDA"),
        (replace(HOPPER, capability=(7, 5)), "capability 8.0, this is 7.5"),
        (replace(HOPPER, dtype=torch.float32), "float16 or bfloat16"),
        (replace(HOPPER, head_dim=12), "not 12"),
    ],
)
def test_asked_for_by_name_and_not_to_be_had(workload: Workload, reason: str, no_flash: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=rf"attention='flash' cannot serve 32/8 heads.*({reason}).*can"):
        choose("flash", workload)


def test_the_engine_says_what_it_cannot_have(no_flash: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"attention='fast'.*triton, flash, sdpa, cpu"):
        Engine.from_pretrained("scenes", device="cpu", attention="fast")
    for name in ("flash", "triton"):
        with pytest.raises(BackendError, match=f"attention='{name}'.*needs CUDA.*sdpa, cpu can"):
            Engine.from_pretrained("scenes", device="cpu", attention=name)
    with pytest.raises(ConfigError):
        check_name("")


def test_sdpa_draws_the_same_picture(base: Engine) -> None:
    other = Engine.from_pretrained("scenes", device="cpu", attention="sdpa")
    expected = base.generate("a ring", decoder="jacobi", seed=3).tokens
    assert torch.equal(other.generate("a ring", decoder="jacobi", seed=3).tokens, expected)
