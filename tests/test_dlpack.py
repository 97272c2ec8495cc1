"""The ops on NumPy (and JAX) arrays: the bits of torch.ops.sjd2, no copies, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from native_cases import verify_arguments, window_state
from torch import Tensor

from sjd2_kernels import dlpack, ops, reference, rng


def as_numpy(values: Any) -> list[Any]:
    return [value.numpy() if isinstance(value, Tensor) else value for value in values]


def sampling(**changed: Any) -> dict[str, Any]:
    """Arguments of sample_window as NumPy arrays, by name."""
    make = np.random.default_rng(0)
    given = {
        "logits": make.standard_normal((2, 3, 8)).astype(np.float32), "seeds": np.array([1, 2]),
        "lengths": np.zeros(2, np.int32), "steps": np.zeros(2, np.int32), "noise": None, "guidance": 1.0,
        "temperature": 0.9, "top_k": 5, "top_p": 1.0, "legal_begin": 0, "legal_end": 8, "per_position": True,
        "need_p": True,
    }  # fmt: skip
    return given | changed


def test_every_op_is_there_with_the_types_it_takes() -> None:
    assert set(ops.NAMES) | set(dlpack.RANDOM) == set(dlpack.NAMES) <= set(dir(dlpack))
    for name in ops.NAMES:
        for argument in getattr(torch.ops.sjd2, name).default._schema.arguments:
            assert ("Tensor" in str(argument.type)) == (argument.name in dlpack.DTYPES), f"{name}: {argument.name}"
    with pytest.raises(AttributeError, match="has no op 'sample': it has embed_window"):
        _ = dlpack.sample


def test_draws_are_those_of_the_op() -> None:
    given = sampling()
    tensors = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in given.values()]
    for got, wanted in zip(dlpack.sample_window(**given), torch.ops.sjd2.sample_window(*tensors), strict=True):
        assert type(got) is np.ndarray and np.array_equal(got, wanted.numpy()) and got.dtype == wanted.numpy().dtype


def test_attention_takes_half_precision_queries() -> None:
    cache = np.zeros((1, 4, 2, 16), np.float16)
    q = np.ones((1, 2, 2, 16), np.float16)
    out = dlpack.window_attention(q, cache, cache + np.float16(1), np.ones(1, np.int32), None, 0, 0.25)
    assert out.dtype == np.float16 and (out == 1).all()
    with pytest.raises(TypeError, match="`q` is float16, expected float32"):
        dlpack.verify(*[q if value == "q" else None for value in dlpack._signature("verify")[0]])


@pytest.mark.parametrize("name", dlpack.RANDOM)
def test_random_numbers(name: str) -> None:
    seeds, positions = np.array([3, 2**40]), np.arange(10).reshape(2, 5)
    rest = (0, 6) if name == "normals" else (0, rng.SAMPLE, 6)
    wanted = getattr(rng, name)(torch.from_numpy(seeds), torch.from_numpy(positions), *rest)
    assert np.array_equal(getattr(dlpack, name)(seeds, positions, *rest), wanted.numpy())


def test_a_step_writes_into_the_arrays_it_was_given() -> None:
    state = window_state(5, 3, 7, 70, 9)
    args = verify_arguments(state, reference.RATIO)
    decided, accepted, settled, fault = dlpack.verify(*as_numpy(args))
    for got, wanted in zip((decided, accepted, settled, fault), torch.ops.sjd2.verify(*args), strict=True):
        assert np.array_equal(got, wanted.numpy())
    batch = len(decided)
    written = [
        np.full((batch, state["padded"]), -1), *as_numpy(state[name].clone() for name in ("lengths", "steps", "done")),
        np.full(batch, -1, np.int32), np.full(batch, -1, np.int32), state["histogram"].clone().numpy(),
        np.arange(batch, dtype=np.int32),
    ]  # fmt: skip
    tensors = [torch.from_numpy(array.copy()) for array in written]
    torch.ops.sjd2.commit(*map(torch.from_numpy, (decided, accepted, fault)), *tensors, state["total"])
    returned = dlpack.commit(decided, accepted, fault, *written, state["total"])
    assert all(got is array for got, array in zip(returned, written, strict=True))
    assert all(np.array_equal(array, tensor.numpy()) for array, tensor in zip(written, tensors, strict=True))
    assert not np.array_equal(written[1], state["lengths"].numpy())


def test_nothing_is_copied() -> None:
    x = np.zeros((4, 8), np.float32)
    assert dlpack._tensor("rms_norm", "x", x, False).data_ptr() == x.ctypes.data
    tensor = torch.zeros(3)
    assert dlpack._array(tensor, "numpy").ctypes.data == tensor.data_ptr()
    assert dlpack._array(tensor, "torch") is tensor


def test_read_only_arrays() -> None:
    given = sampling()
    wanted = dlpack.sample_window(**given)[0]
    for array in given.values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    assert np.array_equal(dlpack.sample_window(**given)[0], wanted)
    weight, residual = np.ones(8, np.float32), np.zeros((2, 8), np.float32)
    residual.flags.writeable = False
    with pytest.raises(ValueError, match=r"rms_norm writes into `residual`, which is read-only: pass a copy"):
        dlpack.rms_norm(np.ones((2, 8), np.float32), weight, 1e-5, residual)
    residual = residual.copy()
    out, same = dlpack.rms_norm(np.ones((2, 8), np.float32), weight, 1e-5, residual)
    assert same is residual and (residual == 1).all() and np.allclose(out, 1.0)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"lengths": np.zeros(2)}, "`lengths` is float64, expected int32: convert it"),
        ({"seeds": np.zeros(2, np.int32)}, "`seeds` is int32, expected int64"),
        ({"logits": np.zeros((2, 3, 8))}, "`logits` is float64, expected float32 or float16 or bfloat16"),
        ({"top_k": np.zeros(1, np.int64)}, "`top_k` is an array, expected a number"),
        ({"seeds": np.array(["a", "b"])}, r"`seeds` \(ndarray\) cannot be handed over"),
        ({"seeds": np.zeros(2, ">i8")}, r"`seeds` \(ndarray\) cannot be handed over"),
        ({"scale": 1.0}, r"unexpected keyword argument 'scale'; expected \(logits, seeds"),
    ],
)
def test_errors_name_op_and_argument(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"sample_window: .*{message}"):
        dlpack.sample_window(**sampling(**changed))


def test_arrays_of_unknown_libraries() -> None:
    class Foreign:
        def __dlpack__(self, **_: object) -> object:
            raise AssertionError("never asked")

    with pytest.raises(TypeError, match="cannot be returned; the first must be of numpy, cupy, torch, jax"):
        dlpack.uniforms(Foreign(), np.zeros((1, 1), np.int64), 0, 0, 1)


def test_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    if not jax.config.jax_enable_x64:
        with pytest.raises(TypeError, match="jax_enable_x64"):
            dlpack.uniforms(jnp.zeros(1, int), jnp.zeros((1, 2), int), 0, 0, 4)
    jax.config.update("jax_enable_x64", True)
    given = sampling()
    arrays = {name: jnp.asarray(v) if isinstance(v, np.ndarray) else v for name, v in given.items()}
    got, wanted = dlpack.sample_window(**arrays), dlpack.sample_window(**given)
    assert all(isinstance(array, jax.Array) for array in got)
    assert all(np.array_equal(array, other) for array, other in zip(got, wanted, strict=True))
    assert dlpack.uniforms(jnp.array([1]), jnp.zeros((1, 3), int), 0, 0, 1).shape == (1, 3, 1)
    # JAX arrays never change: what an op writes comes back as new arrays.
    residual = jnp.zeros((2, 8))
    residual = residual.astype(jnp.float32)
    out, new = dlpack.rms_norm(jnp.ones((2, 8), jnp.float32), jnp.ones(8, jnp.float32), 1e-5, residual)
    assert (new == 1).all() and (residual == 0).all() and isinstance(out, jax.Array)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    given = sampling()
    arrays = {name: cupy.asarray(v) if isinstance(v, np.ndarray) else v for name, v in given.items()}
    tokens = dlpack.sample_window(**arrays)[0]
    assert isinstance(tokens, cupy.ndarray)
    assert np.array_equal(tokens.get(), dlpack.sample_window(**given)[0])
