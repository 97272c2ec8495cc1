"""Compile a decode into packages that a C++ program runs without Python (torch.export + AOTInductor).

    python examples/aoti/export.py --out packages                    # on the CPU, about a minute
    python examples/aoti/export.py --out packages --device cuda      # on a machine with a GPU

Four packages: `begin` makes the first window and the state, `decoder` is the model with a static cache, `step` is
everything between two forward passes, `pixels` turns tokens into a picture. `main.cpp` beside this file is the loop.

In the CPU packages the window's ops stay `torch.ops.sjd2.*`: the C++ program brings them along (csrc/torch_ops.cpp,
over the C core). On CUDA, where the ops are Triton kernels started from Python, their reference in plain PyTorch is
exported instead, so that Inductor makes kernels of it; `--ops reference` does that on the CPU too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sjd2_kernels.ops  # noqa: F401  (registers torch.ops.sjd2)
from sjd2_engine import DecodeConfig
from sjd2_engine.decoders import make_plan
from sjd2_engine.models import load_model
from sjd2_engine.models.family import LoadOptions
from sjd2_engine.models.scenes import BEGIN, BEGIN_IMAGE, FIRST_WORD, MAX_WORDS, ScenesModel
from sjd2_engine.transformer import Transformer
from sjd2_engine.window import initial_tokens
from sjd2_kernels import reference

# What a decode changes, in the order in which `begin` returns it and `step` takes it. All of it is written in place.
STATE = (
    "kv_lengths", "done", "tokens", "lengths", "steps", "failed", "failed_step", "histogram",
    "initial", "drafts", "status", "levels", "q",
)  # fmt: skip


class Begin(nn.Module):
    """seeds i64 [B] -> model inputs i64 [R, W], keys and values [layers, R, S, H, d], then the state."""

    forced: Tensor

    def __init__(self, transformer: Transformer, config: DecodeConfig, forced: Tensor, cache: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("forced", forced)
        self.window, self.cache, self.dtype = config.width, cache, transformer.embedding.dtype
        self.rows = 2 if config.guidance_scale != 1.0 else 1
        self.vocab = transformer.image_vocabulary
        self.q_ids = self.vocab if make_plan(config).tracks_q else 0

    def forward(self, seeds: Tensor) -> tuple[Tensor, ...]:
        batch, drafts = seeds.shape[0], self.window - 1

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((batch, *shape), value, dtype=dtype, device=seeds.device)

        initial = initial_tokens(seeds, self.forced, self.vocab)
        keys = torch.zeros(self.cache, dtype=self.dtype, device=seeds.device)
        state = {
            "kv_lengths": full(0).repeat(self.rows), "done": full(0), "lengths": full(0), "steps": full(0),
            "tokens": full(-1, self.forced.shape[0], dtype=torch.int64), "failed": full(-1), "failed_step": full(-1),
            "histogram": full(0, self.window + 1, dtype=torch.int64), "initial": initial,
            "drafts": initial[:, :drafts].clone(), "status": full(0, drafts), "levels": full(-1, drafts),
            "q": torch.zeros(batch, drafts, self.q_ids, device=seeds.device),
        }  # fmt: skip
        first = torch.cat((full(BEGIN_IMAGE, 1, dtype=torch.int64), state["drafts"]), 1)
        return first.repeat(self.rows, 1), keys, keys.clone(), *(state[name] for name in STATE)


class Decoder(nn.Module):
    """ids i64 [R, W], lengths i32 [R], keys, values -> logits [R, W, V]; new keys and values are written in place."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, ids: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        positions = lengths[:, None].long() + torch.arange(ids.shape[1], device=ids.device)
        row = torch.arange(ids.shape[0], device=ids.device)[:, None]
        # Whatever stands behind a query is stale or yet to come.
        visible = torch.arange(keys.shape[2], device=ids.device) <= positions[:, None, :, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys[layer].index_put_((row, positions), k)
            values[layer].index_put_((row, positions), v)
            q, k, v = (x.transpose(1, 2) for x in (q, keys[layer], values[layer]))
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped).transpose(1, 2)

        embeds = self.transformer.embedding[ids]
        return self.transformer.head(self.transformer(embeds, positions, attend))


class Step(nn.Module):
    """logits [R, W, V], seeds i64 [B], the state -> the next model inputs i64 [R, W]; the state moves in place.

    `ops` is torch.ops.sjd2, or the module of the reference: functions of the same names and arguments.
    """

    forced: Tensor

    def __init__(self, ops: Any, config: DecodeConfig, forced: Tensor, total: int, vocab: int) -> None:
        super().__init__()
        self.register_buffer("forced", forced)
        self.ops, self.config, self.plan, self.total, self.vocab = ops, config, make_plan(config), total, vocab

    def forward(
        self, logits: Tensor, seeds: Tensor, kv_lengths: Tensor, done: Tensor, tokens: Tensor, lengths: Tensor,
        steps: Tensor, failed: Tensor, failed_step: Tensor, histogram: Tensor, initial: Tensor, drafts: Tensor,
        status: Tensor, levels: Tensor, q: Tensor,
    ) -> Tensor:  # fmt: skip
        ops, config, plan, batch = self.ops, self.config, self.plan, seeds.shape[0]
        guided = logits.shape[0] > batch
        drawn, p, bad = ops.sample_window(
            logits.view(2, batch, *logits.shape[1:]) if guided else logits, seeds, lengths, steps, None,
            config.guidance_scale, config.temperature, config.top_k, config.top_p, 0, self.vocab, plan.per_position,
            plan.tracks_q,
        )  # fmt: skip
        decided, accepted, settled, fault = ops.verify(
            drawn, p, bad, drafts, q, status, levels, self.forced, lengths, steps, done, seeds, self.total, plan.rule
        )
        ops.commit(
            decided, accepted, fault, tokens, lengths, steps, done, failed, failed_step, histogram, kv_lengths,
            self.total,
        )  # fmt: skip
        if drafts.shape[1]:
            self._repeat(tokens, initial)
            ops.refine(
                decided, p, accepted, settled, lengths, self.forced, initial, drafts, status, levels, q,
                None, None, None, None, None, None, None, seeds, -1,
            )  # fmt: skip
        last = tokens.gather(1, (lengths[:, None] - 1).clamp(min=0).long())
        last = torch.where(lengths[:, None] > 0, last, BEGIN_IMAGE)
        return torch.cat((last, drafts), 1).repeat(logits.shape[0] // batch, 1)

    def _repeat(self, tokens: Tensor, initial: Tensor) -> None:
        """Drafts to come repeat the token accepted `repeat_distance` positions before them."""
        distance = self.config.repeat_distance
        if not 0 < distance < self.total:
            return
        source, target = tokens[:, :-distance], initial[:, distance:]
        usable = (source >= 0) & (self.forced[distance:] < 0) & (self.forced[:-distance] < 0)
        target.copy_(torch.where(usable, source, target))


class Pixels(nn.Module):
    """tokens i64 [B, P] of the state -> pixels uint8 [B, height, width, 3]."""

    image_positions: Tensor

    def __init__(self, model: ScenesModel) -> None:
        super().__init__()
        self.vq = model.vq
        self.register_buffer("image_positions", torch.tensor(model.layout.image_positions))

    def forward(self, tokens: Tensor) -> Tensor:
        pixels = self.vq.decode(tokens[:, self.image_positions].clamp(min=0))
        return pixels.add(1.0).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def modules(model: ScenesModel, config: DecodeConfig, ops: Any, batch: int) -> dict[str, tuple[nn.Module, tuple]]:
    """Every module with example inputs; shapes are fixed by them."""
    if config.uses_noise:
        raise SystemExit("decoder sjd2 feeds noisy embeddings, these packages feed tokens: take another decoder")
    transformer, sizes = model.transformer, model.transformer.config
    total, vocab, device = len(model.layout), transformer.image_vocabulary, transformer.embedding.device
    forced = torch.tensor([*model.layout.forced, *[0] * config.width], device=device)
    rows = batch * (2 if config.guidance_scale != 1.0 else 1)
    # Room for the longest prompt, the picture, and a last window that reaches beyond it.
    depth = MAX_WORDS + 2 + total + config.width
    cache = (sizes.num_hidden_layers, rows, depth, sizes.num_key_value_heads, sizes.head_dim)
    begin, seeds = Begin(transformer, config, forced, cache), torch.zeros(batch, dtype=torch.int64, device=device)
    ids, keys, values, *state = begin(seeds)
    logits = torch.zeros(rows, config.width, vocab, device=device, dtype=keys.dtype)
    tokens = state[STATE.index("tokens")]
    return {
        "begin": (begin, (seeds,)),
        "decoder": (Decoder(transformer), (ids, state[0], keys, values)),
        "step": (Step(ops, config, forced, total, vocab), (logits, seeds, *state)),
        "pixels": (Pixels(model), (tokens.clamp(min=0),)),
    }


def facts(model: ScenesModel, config: DecodeConfig, batch: int) -> dict[str, str]:
    """What main.cpp has to know of the model; stored in the package `begin`."""
    numbers = {"begin": BEGIN, "begin_image": BEGIN_IMAGE, "first_word": FIRST_WORD, "max_words": MAX_WORDS}
    sizes = {"batch": batch, "window": config.width, "total": len(model.layout)}
    device = model.transformer.embedding.device.type
    words = " ".join(model.tokenizer.words)
    return {name: str(value) for name, value in (numbers | sizes).items()} | {"words": words, "device": device}


@torch.no_grad()
def export(model: ScenesModel, config: DecodeConfig, ops: Any, batch: int) -> dict[str, torch.export.ExportedProgram]:
    """The four programs, not compiled yet."""
    programs = {}
    for name, (module, inputs) in modules(model, config, ops, batch).items():
        # Run it once: the reference keeps constants of its random numbers, and what tracing makes must not be kept.
        module.eval()(*(value.clone() for value in inputs))
        programs[name] = torch.export.export(module, inputs)
    return programs


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile a decode into AOTInductor packages.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--model", default="scenes", help="scenes, scenes-sjd2, or a folder of that family")
    parser.add_argument("--decoder", default="jacobi", help="ar, jacobi, sjd or coupled")
    parser.add_argument("--window", type=int, help="slots per forward pass")
    parser.add_argument("--batch", type=int, default=1, help="pictures decoded together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ops", choices=("sjd2", "reference"), help="default: sjd2 on the CPU, else reference")
    given = parser.parse_args()
    device = torch.device(given.device)
    model = load_model(given.model, device, torch.float32, LoadOptions())
    if not isinstance(model, ScenesModel):
        raise SystemExit(f"{given.model} is of the family {model.family}: this example knows scenes only")
    config = DecodeConfig.build(model.defaults, decoder=given.decoder, window=given.window)
    named = given.ops or ("sjd2" if device.type == "cpu" else "reference")
    programs = export(model, config, torch.ops.sjd2 if named == "sjd2" else reference, given.batch)
    given.out.mkdir(parents=True, exist_ok=True)
    metadata = facts(model, config, given.batch)
    for name, program in programs.items():
        path = given.out / f"{name}.pt2"
        options = {"aot_inductor.metadata": metadata if name == "begin" else {}}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
