"""Memory and time of a run by formula, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..models import ModelFacts
from ..transformer import Transformer
from .lora import TARGETS
from .objective import LOGITS_AT_ONCE
from .options import Options
from .throughput import peak_flops, step_flops

FLOAT, HALF = 4, 2  # bytes
USUAL_SHARE = 0.35  # of a GPU's peak that such training reaches, for the estimate of time only
OVERHEAD = 2 * 2**30  # bytes: CUDA context, communication buffers, fragments of the allocator


@dataclass(frozen=True)
class Footprint:
    """Bytes per device.

    weights, gradients, optimiser   what stays, split over the devices where the run is sharded; the moving average
                                    counts as optimiser
    gathered      of a sharded run: the weights in use and the next ones, whole, and gradients on their way
    activations   kept for the backward pass, and the largest arrays of one block in it
    logits        of the pieces that are computed at once, with their gradients
    tokenizer     the picture tokenizer and other parts beside the transformer
    overhead      a constant for what is not modelled
    """

    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int
    logits: int
    tokenizer: int
    overhead: int = OVERHEAD

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """One run: memory per device, memory of each process on the host while loading, and time where the device's speed
    is known (None where it is not). `parameters`: numbers in the transformer, `trained`: those that change."""

    parameters: int
    trained: int
    footprint: Footprint
    host_bytes: int
    steps: int
    flops_per_step: float
    hours: float | None

    def fits(self, memory: int) -> bool:
        """Whether a device of so many bytes is enough."""
        return self.footprint.total <= memory


def sequence_length(facts: ModelFacts, options: Options) -> int:
    """Inputs of one picture: timestep tokens, a prompt of usual length, the picture."""
    return sum(options.noise.levels) + facts.prompt_length + len(facts.layout) - 1


def _adapters(core: Transformer, rank: int) -> int:
    return sum(
        rank * sum(weight.shape)
        for name, weight in core.named_parameters()
        if weight.dim() == 2 and name.removesuffix(".weight").rpartition(".")[2] in TARGETS
    )


def _activations(facts: ModelFacts, options: Options, bytes_each: int) -> int:
    sizes, tokens = facts.transformer, sequence_length(facts, options) * options.micro_batch
    width, heads = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    kv = sizes.num_key_value_heads * sizes.head_dim
    # Of one block: normed inputs (2), qkv, rotated and expanded q, k, v, output twice, gate and up and their product.
    inside = 4 * width + (heads + 2 * kv) * 2 + 4 * heads + 4 * sizes.intermediate_size
    edges = tokens * width * bytes_each * sizes.num_hidden_layers
    if options.checkpointing:
        # Twice for the block at work: its activations, and their gradients.
        return edges + 2 * tokens * inside * bytes_each
    return tokens * inside * bytes_each * (sizes.num_hidden_layers + 1)


def estimate(facts: ModelFacts, options: Options, devices: int, pictures: int, device_name: str = "") -> Estimate:
    """What a run of `options` on `devices` devices takes, over `pictures` training pictures."""
    core = Transformer.outline(facts.transformer, facts.vocabulary, facts.image_vocabulary)
    total = sum(weight.numel() for weight in core.parameters())
    trained = _adapters(core, options.lora) if options.lora else total
    split = devices if options.shard else 1
    working = HALF if options.precision == "bf16" else FLOAT
    frozen = (working if options.lora else FLOAT) * total + (FLOAT * trained if options.lora else 0)
    states = 2 * FLOAT + (FLOAT if options.ema else 0)
    block = sum(weight.numel() for weight in core.blocks[0].parameters())
    root = total - block * len(core.blocks)
    gathered = 0
    if options.shard:
        # The root (tables and head) stays whole, two blocks at a time are; float32 gradients of the root and a block.
        gathered = working * (root + 2 * block) + (working + FLOAT) * (root + block)
    elif working == HALF and not options.lora:
        gathered = HALF * block  # autocast's copies, one block at a time under recomputation
        gathered = gathered if options.checkpointing else HALF * total
    rows = options.micro_batch * facts.layout.image_count * facts.image_vocabulary
    steps = options.steps_for(pictures)
    flops = step_flops(facts, sum(options.noise.levels)) * options.batch
    if options.checkpointing:
        flops *= 4 / 3
    peak = peak_flops(device_name)
    hours = None if peak is None else steps * flops / (devices * peak * USUAL_SHARE) / 3600
    return Estimate(
        total, trained,
        Footprint(
            frozen // split, FLOAT * trained // split, states * trained // split, gathered,
            _activations(facts, options, working), min(rows, LOGITS_AT_ONCE) * (2 * FLOAT + working),
            facts.pixel_parameters * FLOAT,
        ),
        FLOAT * (total + facts.pixel_parameters), steps, flops, hours,
    )  # fmt: skip
