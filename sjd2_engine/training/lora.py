"""Low-rank adapters (peft) on the blocks' matrices, for machines on which all weights do not fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..transformer import Transformer

TARGETS = ("qkv", "out", "gate_up", "down")
NAME = "default"


def add_adapters(core: Transformer, rank: int) -> None:
    """Put adapters of a rank on every block's matrices, in place, and let nothing else be trained."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("--lora needs peft: pip install 'sjd2-engine[train]'") from None
    core.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), lora_dropout=0.0)
    inject_adapter_in_model(config, core)
    for name, weight in core.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
        elif "lora_" in name:
            raise ConfigError(f"peft left {name} frozen: this version of it cannot be used")


def merged_weights(core: Transformer) -> dict[str, Tensor]:
    """The adapted matrices with their adapters added in, float32 on the CPU, by the core's own names."""
    from peft.tuners.lora import Linear

    found = {}
    for name, module in core.named_modules():
        if isinstance(module, Linear):
            adapted: Any = module  # peft's layers get their methods by mixins
            merged = adapted.get_base_layer().weight.float() + adapted.get_delta_weight(NAME).float()
            found[f"{name}.weight"] = merged.detach().cpu()
    return found
