"""The transformer's ops: contracts with PyTorch (opcheck), small cases by hand, and independent formulations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sjd2_engine.transformer import rope_table
from sjd2_kernels import reference

ops = torch.ops.sjd2


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_case(heads: int = 4, kv_heads: int = 2, front: int = 3, width: int = 5, dim: int = 8) -> Any:
    """Two rows of different lengths, levels mixed with none, garbage in every slot that is not seen."""
    torch.manual_seed(0)
    lengths = i32(0, 6)
    slots = front + 6 + width + 2
    case = SimpleNamespace(
        q=torch.randn(2, width, heads, dim),
        keys=torch.randn(2, slots, kv_heads, dim),
        values=torch.randn(2, slots, kv_heads, dim),
        lengths=lengths,
        levels=torch.randint(-1, front, (2, width), dtype=torch.int32) if front else None,
        front=front,
        scale=dim**-0.5,
    )
    for row, length in enumerate(lengths.tolist()):
        for cache in (case.keys, case.values):
            cache[row, front + length + width :] = torch.nan
    return case


def rope_case(norm: int, per_head: bool = True) -> list[Any]:
    torch.manual_seed(1)
    rows, width, heads, kv_heads, dim = 2, 3, 4, 2, 6
    cos, sin = rope_table(20, dim, 100.0)
    weights = [
        torch.randn(n if per_head else 1, dim) if norm >= needed else None
        for n, needed in ((heads, 1), (heads, 2), (kv_heads, 1), (kv_heads, 2))
    ]
    qkv = torch.randn(rows, width, heads + 2 * kv_heads, dim)
    caches = [torch.randn(rows, 12, kv_heads, dim) for _ in range(2)]
    return [qkv, cos, sin, i32(0, 5), *caches, *weights, norm, 1e-5, 2]


def compact_case() -> list[Any]:
    torch.manual_seed(2)
    keys, values = torch.randn(2, 3, 3, 12, 2, 4)
    source = torch.tensor([[0, 2, 5, 0], [3, 4, 5, 6], [9, 9, 9, 9]], dtype=torch.int32)
    return [keys, values, i32(1, 3, 2), source, i32(3, 4, 0), 2]


def arguments(name: str) -> list[tuple[Any, ...]]:
    x = torch.randn(2, 3, 8)
    case = attention_case()
    return {
        "rms_norm": [(x, torch.ones(8), 1e-5, None), (x.bfloat16(), torch.ones(8), 1e-5, x.bfloat16())],
        "swiglu": [(x,), (x.half(),)],
        "qk_norm_rope_cache": [tuple(rope_case(norm)) for norm in (0, 1, 2)],
        "window_attention": [
            (case.q, case.keys.nan_to_num(), case.values.nan_to_num(), case.lengths, levels, 3, 0.5)
            for levels in (case.levels, None)
        ],
        "kv_compact": [tuple(compact_case())],
    }[name]


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "qk_norm_rope_cache", "window_attention", "kv_compact"])
def test_opcheck(name: str) -> None:
    for args in arguments(name):
        torch.library.opcheck(getattr(ops, name), args)


# -------------------------------------------------------------------- rms_norm, swiglu


def test_rms_norm() -> None:
    x, weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 10.0])
    expected = torch.tensor([[3.0, 40.0], [0.0, 20.0]]) / torch.tensor([[12.5**0.5], [2.0**0.5]])
    torch.testing.assert_close(ops.rms_norm(x, weight, 0.0, None), expected)
    x, weight = torch.randn(3, 5, 96), torch.randn(96)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-3, None), F.rms_norm(x, (96,), weight, 1e-3))


def test_rms_norm_with_residual_rounds_the_sum_before_it_is_normalised() -> None:
    x, residual, weight = torch.randn(4, 32).bfloat16(), torch.randn(4, 32).bfloat16(), torch.randn(32)
    total = residual + x
    out = ops.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    assert torch.equal(out, F.rms_norm(total.float(), (32,), weight, 1e-5).bfloat16())


def test_rms_norm_keeps_the_dtype_of_x_beside_a_wider_residual() -> None:
    x, residual = torch.randn(4, 32).bfloat16(), torch.randn(4, 32)
    total = residual + x.float()
    out = ops.rms_norm(x, torch.ones(32), 1e-5, residual)
    assert torch.equal(residual, total)
    assert torch.equal(out, F.rms_norm(total, (32,), None, 1e-5).bfloat16())


def test_swiglu() -> None:
    x = torch.tensor([0.0, 1.0, -40.0, 7.0, 2.0, 3.0])
    expected = torch.tensor([0.0, 2.0 / (1.0 + torch.tensor(-1.0).exp()), 0.0])
    torch.testing.assert_close(ops.swiglu(x), expected)
    gate, up = torch.randn(2, 3, 24, dtype=torch.float64).unbind()
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(ops.swiglu(torch.cat((gate, up), 1).float()), expected.float())


# -------------------------------------------------------------------- qk_norm_rope_cache


def test_rotation_by_hand() -> None:
    """Two dimensions at position 1 with a quarter turn per position: (x, y) becomes (−y, x)."""
    cos = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    sin = torch.tensor([[0.0, 0.0], [-1.0, 1.0]])
    qkv = torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).view(1, 1, 3, 2)
    keys, values = torch.full((2, 1, 4, 1, 2), 9.0)
    q = ops.qk_norm_rope_cache(qkv, cos, sin, i32(1), keys, values, None, None, None, None, 0, 0.0, 1)
    assert q.flatten().tolist() == [-4.0, 3.0]
    assert keys.flatten().tolist() == [9, 9, 9, 9, -6, 5, 9, 9]
    assert values.flatten().tolist() == [9, 9, 9, 9, 7, 8, 9, 9]


@pytest.mark.parametrize("norm", [reference.NO_NORM, reference.RMS_NORM, reference.LAYER_NORM])
@pytest.mark.parametrize("per_head", [True, False])
def test_qk_norm_rope_cache_equals_transformers(norm: int, per_head: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    qkv, cos, sin, lengths, keys, values, q_weight, q_bias, k_weight, k_bias, *rest = rope_case(norm, per_head)
    old_keys, old_values = keys.clone(), values.clone()
    q, k, v = qkv.split((4, 2, 2), 2)
    if norm == reference.RMS_NORM:
        q, k = F.rms_norm(q, (6,), eps=1e-5) * q_weight, F.rms_norm(k, (6,), eps=1e-5) * k_weight
    if norm == reference.LAYER_NORM:
        normed = []
        for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
            layer = ChameleonLayerNorm(weight.shape)
            layer.load_state_dict({"weight": weight, "bias": bias})
            normed.append(layer(x).detach())
        q, k = normed
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=24, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
        )
    )
    positions = lengths[:, None].long() + torch.arange(3)
    angles = rotary(q, positions)
    q, k = apply_rotary_pos_emb(q, k, *angles, unsqueeze_dim=2)

    got = ops.qk_norm_rope_cache(
        qkv, cos, sin, lengths, keys, values, q_weight, q_bias, k_weight, k_bias, norm, *rest[1:]
    )
    torch.testing.assert_close(got, q)
    for row, length in enumerate(lengths.tolist()):
        old_keys[row, 2 + length : 5 + length], old_values[row, 2 + length : 5 + length] = k[row], v[row]
    torch.testing.assert_close(keys, old_keys)
    assert torch.equal(values, old_values)


# -------------------------------------------------------------------- window_attention


def test_window_attention_by_hand() -> None:
    """One dimension, logits 0: a query gets the mean of the values it sees, timestep slot included."""
    values = torch.tensor([100.0, 200.0, 1.0, 2.0, 6.0, torch.nan]).view(1, 6, 1, 1)
    keys = torch.zeros_like(values)
    keys[0, 5] = torch.nan
    q, levels = torch.ones(1, 2, 1, 1), torch.tensor([[-1, 1]], dtype=torch.int32)
    got = ops.window_attention(q, keys, values, i32(1), levels, 2, 1.0)
    assert got.flatten().tolist() == [1.5, pytest.approx((1 + 2 + 6 + 200) / 4)]
    got = ops.window_attention(q, keys, values, i32(1), None, 2, 1.0)
    assert got.flatten().tolist() == [1.5, 3.0]


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("front", [0, 3])
def test_window_attention_equals_scaled_dot_product(heads: int, kv_heads: int, front: int) -> None:
    case = attention_case(heads, kv_heads, front)
    got = ops.window_attention(*vars(case).values())
    for row, length in enumerate(case.lengths.tolist()):
        for step in range(5):
            seen = list(range(front, front + length + step + 1))
            if front and case.levels[row, step] >= 0:
                seen.append(int(case.levels[row, step]))
            q, k, v = case.q[row, step][:, None], case.keys[row, seen], case.values[row, seen]
            expected = F.scaled_dot_product_attention(
                q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=True
            )
            torch.testing.assert_close(got[row, step], expected[0, :, 0])


def test_window_attention_of_a_whole_sequence_is_causal_attention() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 16).unbind()
    got = ops.window_attention(q, k, v, i32(0, 0), None, 0, 16**-0.5)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))


# -------------------------------------------------------------------- kv_compact


def test_kv_compact() -> None:
    keys, values, lengths, source, counts, front = compact_case()
    expected = keys.clone(), values.clone()
    for new, old in zip(expected, (keys, values)):
        for row in range(3):
            for j in range(int(counts[row])):
                begin = front + int(lengths[row])
                new[:, row, begin + j] = old[:, row, begin + int(source[row, j])]
    ops.kv_compact(keys, values, lengths, source, counts, front)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
