"""transformers' own generate on the same random weights: seconds per token, beside the engine's AR step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sjd2_engine.transformer import Transformer, TransformerConfig

from .decoding import LOOPED, loop, loop_seconds
from .geometry import Geometry, RandomModel, mid_picture, seek
from .run import Run

SHORT = 16  # tokens of the run that is subtracted: prompt and start
COMPILING = 240.0  # seconds that torch.compile of a large model may take
RATIO_GOAL = 20.0  # times that a picture is to be faster than with transformers


def stored(geometry: Geometry, transformer: Transformer) -> dict[str, Tensor]:
    """The weights under transformers' names, as views. The input table is the head of all ids, too: as dear as one."""
    core, own = geometry.core, transformer.state_dict()
    heads = [core.num_attention_heads, core.num_key_value_heads]
    rows = [count * core.head_dim for count in (*heads, heads[1])]
    tensors = {"model.embed_tokens.weight": own["embedding"], "model.norm.weight": own["norm"]}
    tensors["lm_head.weight"] = own["embedding"]
    for i in range(core.num_hidden_layers):
        old, new = f"blocks.{i}.", f"model.layers.{i}."
        for part, weight in zip("qkv", own[old + "qkv.weight"].split(rows)):
            tensors[f"{new}self_attn.{part}_proj.weight"] = weight
        for part, weight in zip(("gate", "up"), own[old + "gate_up.weight"].chunk(2)):
            tensors[f"{new}mlp.{part}_proj.weight"] = weight
        tensors[new + "self_attn.o_proj.weight"] = own[old + "out.weight"]
        tensors[new + "mlp.down_proj.weight"] = own[old + "down.weight"]
        tensors[new + "input_layernorm.weight"] = own[old + "attention_norm"]
        tensors[new + "post_attention_layernorm.weight"] = own[old + "mlp_norm"]
        if core.qk_norm == "layer":
            for kind in ("weight", "bias"):
                for part, piece in zip("qk", own[f"{old}qk_{kind}"].split(heads)):
                    tensors[f"{new}self_attn.{part}_norm.{kind}"] = piece
    return tensors


def library_config(core: TransformerConfig, vocabulary: int) -> Any:
    """Of Chameleon where queries and keys are normed, else of Llama."""
    from transformers import ChameleonConfig, LlamaConfig

    sizes: dict[str, Any] = {
        name: getattr(core, name)
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rms_norm_eps", "max_position_embeddings",
        )
    }  # fmt: skip
    sizes |= {"vocab_size": vocabulary, "rope_parameters": {"rope_type": "default", "rope_theta": core.rope_theta}}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    if core.qk_norm == "none":
        return LlamaConfig(**sizes)
    del sizes["head_dim"]  # Chameleon's is always the width over the heads
    # One id to be left out, instead of all that a picture has: what users do with pictures needs it so as well.
    return ChameleonConfig(**sizes, vocabulary_map={"<image>": 0, "IMGIMGAZ": 1})


def library_model(geometry: Geometry, transformer: Transformer) -> Any:
    """transformers' model around the same memory."""
    from transformers import ChameleonForConditionalGeneration, LlamaForCausalLM

    config = library_config(geometry.core, geometry.vocabulary)
    kind = LlamaForCausalLM if geometry.core.qk_norm == "none" else ChameleonForConditionalGeneration
    with torch.device("meta"):
        model: Any = kind(config)
    left = model.load_state_dict(stored(geometry, transformer), strict=False, assign=True)
    missing = [name for name in left.missing_keys if not name.startswith("model.vqmodel.")]
    if missing or left.unexpected_keys:
        raise ValueError(f"this transformers names weights otherwise: {missing[:3]}, {left.unexpected_keys[:3]}")
    if hasattr(model.model, "vqmodel"):
        model.model.vqmodel = None  # pictures are no input here, and its weights have no memory
    if geometry.core.head_hidden:
        model.lm_head = transformer.head  # of pictures alone, as the model's own generate has it
    device = transformer.embedding.device
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def ways(geometry: Geometry, device: torch.device) -> dict[str, dict[str, Any]]:
    """How users run generate: rows, and its options."""
    guided = {"guidance_scale": float(geometry.defaults["guidance_scale"])}
    static = {"cache_implementation": "static"}
    found = {
        "guidance by its own processor, growing cache": {"rows": 1, **guided},
        "two rows without guidance, growing cache": {"rows": 2},
        "two rows without guidance, static cache": {"rows": 2, **static, "disable_compile": True},
    }
    if device.type == "cuda":  # where transformers compiles what has a static cache
        found["two rows without guidance, static cache, compiled"] = {"rows": 2, **static}
    return found


@torch.inference_mode()
def token_seconds(run: Run, model: Any, geometry: Geometry, options: dict[str, Any], count: int) -> float:
    """Seconds per token: a long run minus a short one, over the tokens between."""
    options = dict(options)
    device = model.model.embed_tokens.weight.device
    shape = (options.pop("rows"), geometry.prompt)
    ids = torch.randint(2, geometry.vocabulary, shape, generator=torch.Generator().manual_seed(2)).to(device)
    if "guidance_scale" in options:
        options["negative_prompt_ids"] = ids[:, -1:]

    def seconds(tokens: int) -> float:
        run.settle()
        began = time.perf_counter()
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=geometry.defaults.get("top_k", 0),
            max_new_tokens=tokens, **options,
        )  # fmt: skip
        run.settle()
        if found.shape[1] != geometry.prompt + tokens:
            raise ValueError(f"transformers drew {found.shape[1] - geometry.prompt} tokens instead of {tokens}")
        return time.perf_counter() - began

    short = min(SHORT, count // 4)
    seconds(short)  # warms up, and compiles
    return max(seconds(short + count) - seconds(short), 1e-9) / count


def compare(run: Run, geometry: Geometry, model: RandomModel, count: int = 200) -> None:
    """Seconds per token of each way and of the engine, in one run, and what both predict for a picture."""
    import transformers

    own = own_seconds(run, geometry, model)
    entries: list[dict[str, Any]] = []
    result = {
        "model": geometry.name, "weights": "random", "transformers": transformers.__version__, "tokens": count,
        "engine_step_ms": {str(window): 1e3 * seconds for window, seconds in own.items()}, "generate": entries,
    }  # fmt: skip
    run.results.append(result)
    name = f"{geometry.name} (random weights)"
    run.say(f"{name}: the engine's steps, " + ", ".join(f"W={w} {1e3 * s:.2f} ms" for w, s in own.items()))
    theirs = library_model(geometry, model.transformer)
    for way, options in ways(geometry, run.device).items():
        if not run.has_time_for(way, COMPILING if way.endswith("compiled") else 60.0):
            continue
        try:
            seconds = token_seconds(run, theirs, geometry, options, count)
        except Exception as error:  # a way of theirs that fails here must not cost the other ways' figures
            run.skip(way, f"{type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        entry = {"way": way, "token_ms": 1e3 * seconds, "engine_ar_is_faster_by": seconds / own[1]}
        entry["predicted"] = predicted(geometry, own, seconds)
        entries.append(entry)
        run.say(f"{name}, transformers, {way}: {1e3 * seconds:.2f} ms a token, {seconds / own[1]:.1f}x the engine's AR")
        for picture in entry["predicted"]:
            run.say(
                f"{name}, predicted: {picture['method']} {picture['engine_s']:.2f} s a picture, transformers' AR "
                f"{picture['transformers_s']:.2f} s, {picture['ratio']:.1f}x"
            )
        run.save()
    if geometry.picture_goal:
        for entry in (entry for entry in entries if "own processor" in entry["way"]):  # guidance as their users have it
            ratio = next(picture["ratio"] for picture in entry["predicted"] if picture["method"] == "SJD2")
            run.goal(f"{name}: predicted, SJD2 over transformers' generate, {entry['way']}", ratio, at_least=RATIO_GOAL)


def predicted(geometry: Geometry, own: dict[int, float], token: float) -> list[dict[str, Any]]:
    """Seconds of a picture by the published forward passes, and of generate, which takes one per token."""
    theirs = len(geometry.layout) * token
    return [
        {"method": entry.method, "engine_s": (ours := entry.forwards * own[entry.window]), "transformers_s": theirs}
        | {"ratio": theirs / ours}
        for entry in geometry.published
    ]


def own_seconds(run: Run, geometry: Geometry, model: RandomModel) -> dict[int, float]:
    """Wall-clock seconds per step of the engine's loop by window, with guidance, in the middle of one picture."""
    found = {}
    for window in sorted({1} | {entry.window for entry in geometry.published}):
        config = geometry.config("ar" if window == 1 else "jacobi", window)
        slots = mid_picture(geometry, model, config, 1, run.attention)
        loop(slots, 3)
        seek(slots, geometry)
        found[window] = loop_seconds(run, slots, 2 if run.smoke else LOOPED)
    return found
