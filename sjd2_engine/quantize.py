"""Weights of a loaded decoder in 8 bits, by torchao: optional, `[quant]`.

Products still run in the model's dtype, from weights that are scaled up on the way: what is saved is memory and the
time to read it, which is most of the time of a narrow window on a GPU.
"""

from __future__ import annotations

import importlib.util

import torch

from .errors import BackendError, ConfigError
from .transformer import Transformer

KINDS = ("int8", "fp8")
FP8_CAPABILITY = (8, 9)


def check_quantize(kind: str, device: torch.device) -> None:
    """Raises ConfigError for an unknown kind, BackendError where torchao or the device cannot."""
    if kind not in KINDS:
        raise ConfigError(f"quantize={kind!r}: expected one of {', '.join(KINDS)}, or None for the weights as they are")
    if importlib.util.find_spec("torchao") is None:
        raise BackendError(f"quantize={kind!r} needs torchao: pip install 'sjd2-engine[quant]'")
    if kind == "fp8":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if capability is None or capability < FP8_CAPABILITY:
            found = f"compute capability {capability[0]}.{capability[1]}" if capability else str(device)
            raise BackendError(
                f"quantize='fp8' needs a GPU of compute capability 8.9 or newer, this is {found}; take 'int8'"
            )


def quantize_linears(model: Transformer, kind: str) -> None:
    """Keep the weights of the blocks' linear layers in 8 bits with a scale per output, in place; for inference only.

    The input table and the head stay: they are a small part of a large model, and decide tokens most directly.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # torchao would otherwise change settings of torch.compile for the whole process.
    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind](set_inductor_config=False)
    quantize_(model.blocks, config)
