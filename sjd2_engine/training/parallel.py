"""Weights, gradients and optimiser states split over processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..errors import ConfigError


def shard_over(objective: nn.Module, blocks: Iterable[nn.Module], device: torch.device, precision: str) -> None:
    """Shard in place, block by block: float32 shards move to `device`, one block at a time is whole.

    precision "bf16": weights are gathered and passes run in bfloat16, gradients are summed in float32.
    """
    if not dist.is_initialized():
        raise ConfigError(
            "--shard splits a model over processes and this is a single one; start it by: accelerate launch "
            "--num_processes N -m sjd2_engine.cli finetune … --shard"
        )
    kind = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(kind, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    for module in objective.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def full_state(objective: nn.Module) -> dict[str, Tensor]:
    """The core's trained parameters, whole and on the CPU, on the main process; called by all together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(objective, options=options)
    return {name.removeprefix("core."): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
