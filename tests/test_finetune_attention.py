"""Attention of noise training: the flash-and-merge path against a dense mask in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sjd2_engine.schedule import CLEAN
from sjd2_engine.training.attention import _flash, _flash_backward, timestep_attention


def dense(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, steps: int) -> Tensor:
    """The definition: causal, every noisy query also sees its level's timestep token, which sees only itself."""
    length = q.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    seen = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(q), 1, 1)
    seen[:, steps:, :steps] = levels[:, :, None] == torch.arange(steps)
    seen[:, :steps, :steps] = torch.eye(steps, dtype=torch.bool)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


Given = tuple[Tensor, Tensor, Tensor]


def each(change: Callable[[Tensor], Tensor], given: Given) -> Given:
    q, k, v = given
    return change(q), change(k), change(v)


def case(length: int, heads: int, kv_heads: int, width: int, steps: int, dtype: torch.dtype) -> tuple[Given, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, steps + length, n, width) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    levels = torch.randint(CLEAN, steps, (2, length), generator=generator)
    levels[0, : length // 3] = CLEAN
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), levels


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("length, width, steps", [(1, 8, 1), (7, 6, 3), (70, 20, 5), (530, 16, 2)])
def test_output_and_gradients_are_those_of_the_dense_mask(
    heads: int, kv_heads: int, length: int, width: int, steps: int
) -> None:
    given, levels = case(length, heads, kv_heads, width, steps, torch.float64)
    found, expected = (f(*given, levels, steps) for f in (timestep_attention, dense))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), given), torch.autograd.grad((expected * weights).sum(), given)
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


def test_gradients_by_finite_differences() -> None:
    given, levels = case(5, 4, 2, 4, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: timestep_attention(q, k, v, levels, 3), given)


def test_bfloat16_is_as_close_as_the_dense_mask_in_bfloat16() -> None:
    given, levels = case(64, 4, 2, 32, 3, torch.bfloat16)
    exact = dense(*each(Tensor.double, given), levels, 3)
    error = (timestep_attention(*given, levels, 3).double() - exact).abs().max()
    assert error <= 2 * (dense(*given, levels, 3).double() - exact).abs().max()


def test_clean_queries_see_no_timestep() -> None:
    given, levels = case(9, 2, 2, 8, 3, torch.float64)
    clean = torch.full_like(levels, CLEAN)
    out = timestep_attention(*given, clean, 3)
    q, k, v = (x[:, 3:].transpose(1, 2) for x in given)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out[:, 3:], expected, atol=1e-12, rtol=1e-12)
    grads = torch.autograd.grad(out[:, 3:].sum(), given)
    assert all(not grad[:, :3].any() for grad in grads)


def test_padding_on_the_right_changes_nothing() -> None:
    given, levels = case(12, 4, 2, 8, 3, torch.float64)
    other = each(lambda x: x.detach().clone(), given)
    for x in other:
        x[0, 3 + 8 :] = 1e3
    out, padded = timestep_attention(*given, levels, 3), timestep_attention(*other, levels, 3)
    assert torch.equal(out[0, : 3 + 8], padded[0, : 3 + 8]) and torch.equal(out[1], padded[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 104])
def test_cuda_flash_kernels_take_these_arguments(dtype: torch.dtype, width: int) -> None:
    """Shapes only, by torch's own rules for its CUDA kernels: no device is needed, no number is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        q, k, v, grad = (torch.empty(2, 4, 70, width, device="cuda", dtype=dtype) for _ in range(4))
        out, lse, rest = _flash(q, k, v, 0.1)
        grads = _flash_backward(grad, q, k, v, out, lse, rest, 0.1)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert len(grads) == 3 and all(x.shape == q.shape for x in grads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 100, 128])
def test_on_a_gpu(dtype: torch.dtype, width: int) -> None:
    given, levels = case(300, 4, 2, width, 3, dtype)
    exact = each(lambda x: x.detach().double().requires_grad_(), given)
    device = each(lambda x: x.detach().cuda().requires_grad_(), given)
    weights = torch.randn(given[0].shape, dtype=torch.float64)
    expected = dense(*exact, levels, 3)
    found = timestep_attention(*device, levels.cuda(), 3)
    grads = torch.autograd.grad((found.double() * weights.cuda()).sum(), device)
    rough = each(lambda x: x.detach().clone().requires_grad_(), given)
    plain = dense(*rough, levels, 3)
    pairs = [(found, plain, expected)]
    others = torch.autograd.grad((plain.double() * weights).sum(), rough)
    pairs += zip(grads, others, torch.autograd.grad((expected * weights).sum(), exact))
    for mine, other, truth in pairs:
        limit = 2 * (other.double() - truth).abs().max() + 1e-5 * truth.abs().max()
        assert (mine.cpu().double() - truth).abs().max() <= limit
