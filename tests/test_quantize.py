"""Weights in 8 bits and blocks through torch.compile, on the bundled model."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from sjd2_engine import Engine
from sjd2_engine.cache import StaticCache
from sjd2_engine.errors import BackendError, ConfigError
from sjd2_engine.linear import PackedLinear
from sjd2_engine.quantize import check_quantize
from sjd2_engine.transformer import Block

CPU = torch.device("cpu")


def logits(engine: Engine) -> torch.Tensor:
    """Of a prefill of 40 random entries and a window behind it."""
    core = engine.model.transformer
    embeds = core.embedding[torch.randint(256, (1, 56), generator=torch.Generator().manual_seed(0))]
    cache = StaticCache(core.config, 1, 60, 0, CPU, torch.float32)
    with torch.inference_mode():
        first = cache.forward(core, embeds[:, :40])
        cache.lengths.fill_(40)
        return core.head(torch.cat([first, cache.forward(core, embeds[:, 40:])], 1))


def test_int8_weights(base: Engine) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    engine = Engine.from_pretrained("scenes", device="cpu", quantize="int8")
    core = engine.model.transformer
    for block in core.blocks:
        assert isinstance(block, Block)
        for layer, plain in ((block.qkv, "qkv"), (block.out, "out"), (block.gate_up, "gate_up"), (block.down, "down")):
            assert isinstance(layer, torch.nn.Linear), f"{plain} was packed"
            stored: Any = layer.weight
            assert stored.qdata.dtype == torch.int8 and stored.qdata.shape == layer.weight.shape
    assert isinstance(core.head, PackedLinear)  # is not quantised, so it is packed as ever
    expected, got = logits(base), logits(engine)
    error = float((got - expected).pow(2).mean() / expected.pow(2).mean()) ** 0.5
    assert 1e-4 < error < 0.03  # 8 bits, and not the weights as they were
    assert engine.model_name == "scenes+int8"
    result = engine.generate("a red circle", decoder="jacobi", seed=0)
    assert result.tokens.shape == (1, 256) and result.images[0] is not None


def test_what_cannot_be_quantised_is_said_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="quantize='int4': expected one of int8, fp8"):
        Engine.from_pretrained("no-such-model", device="cpu", quantize="int4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else object())
    with pytest.raises(BackendError, match=r"pip install 'sjd2-engine\[quant\]'"):
        Engine.from_pretrained("no-such-model", device="cpu", quantize="int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(BackendError, match=r"8\.9 or newer, this is cpu; take 'int8'"):
        Engine.from_pretrained("no-such-model", device="cpu", quantize="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(BackendError, match=r"this is compute capability 8\.6"):
        check_quantize("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_quantize("fp8", torch.device("cuda"))


@pytest.mark.slow  # a C++ compiler makes the kernels: some ten seconds the first time
def test_compiled_blocks_draw_the_same_tokens(base: Engine) -> None:
    engine = Engine.from_pretrained("scenes", device="cpu", compile=True)
    expected, got = logits(base), logits(engine)
    assert engine.model.transformer.compiled and not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    options: dict[str, Any] = {"decoder": "ar", "temperature": 0.0}
    tokens = base.generate("three green stars", **options).tokens
    assert torch.equal(engine.generate("three green stars", **options).tokens, tokens)
