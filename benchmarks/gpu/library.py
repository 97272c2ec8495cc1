"""transformers' own generate on the same random weights: seconds per token, beside the engine's AR step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sjd2_engine.transformer import Transformer, TransformerConfig

from .decoding import Run, loop, loop_seconds, settle
from .geometry import Geometry, RandomModel, mid_picture

SHORT = 16  # tokens of the run that is subtracted: prompt and start
COMPILING = 240.0  # seconds that torch.compile of a large model may take


def stored(geometry: Geometry, transformer: Transformer) -> dict[str, Tensor]:
    """The weights under transformers' names, as views. The head of all ids is the input table: it costs as much."""
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
    device = model.lm_head.weight.device
    shape = (options.pop("rows"), geometry.prompt)
    ids = torch.randint(2, geometry.vocabulary, shape, generator=torch.Generator().manual_seed(2)).to(device)
    if "guidance_scale" in options:
        options["negative_prompt_ids"] = ids[:, -1:]

    def seconds(tokens: int) -> float:
        settle(run)
        began = time.perf_counter()
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=geometry.defaults.get("top_k", 0),
            max_new_tokens=tokens, **options,
        )  # fmt: skip
        settle(run)
        if found.shape[1] != geometry.prompt + tokens:
            raise ValueError(f"transformers drew {found.shape[1] - geometry.prompt} tokens instead of {tokens}")
        return time.perf_counter() - began

    short = min(SHORT, count // 4)
    seconds(short)  # warms up, and compiles
    return max(seconds(short + count) - seconds(short), 1e-9) / count


def compare(run: Run, geometry: Geometry, model: RandomModel, count: int = 200) -> dict[str, Any]:
    """Seconds per token of each way and of the engine's AR, in one run."""
    import transformers

    own = own_seconds(run, geometry, model, count)
    run.say(f"{geometry.name} (random weights): engine AR {1e3 * own:.2f} ms a token")
    theirs = library_model(geometry, model.transformer)
    entries = []
    for way, options in ways(geometry, run.device).items():
        needed = COMPILING if way.endswith("compiled") else 60.0
        if not run.has_time_for(way, 0 if run.smoke else needed):
            continue
        seconds = token_seconds(run, theirs, geometry, options, count)
        entries.append({"way": way, "token_ms": 1e3 * seconds, "engine_is_faster_by": seconds / own})
        run.say(f"transformers, {way}: {1e3 * seconds:.2f} ms a token, {seconds / own:.1f}x the engine's AR")
    del theirs
    run.free()
    return {
        "model": geometry.name,
        "weights": "random",
        "transformers": transformers.__version__,
        "tokens": count,
        "engine_ar_ms": 1e3 * own,
        "generate": entries,
    }


def own_seconds(run: Run, geometry: Geometry, model: RandomModel, count: int) -> float:
    """Wall-clock seconds per token of the engine's AR loop with guidance, in the middle of a picture."""
    slots = mid_picture(geometry, model, geometry.config("ar", 1), 1)
    loop(slots, 3)
    return loop_seconds(run, slots, min(count, len(geometry.layout) - geometry.middle - 4))
