"""Jacobi windows inside Hugging Face transformers, on a model that is in memory already.

    model.generate(**inputs, custom_generate=sjd2_engine.hf.generate, decoder="sjd", window=32, cfg_scale=3.0)

works for Chameleon (and Anole, Lumina-mGPT in that class) and Emu3; `generate_image` for Janus, whose `generate` takes
no other loop. The model stays as it is: its own layers run, and their attention, for as long as the decode takes, is
one that reads and writes this package's cache, in which every row has a length of its own. The engine's core is not
used because it holds queries, keys and values as one matrix: the weights would be in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .cache import StaticCache
from .config import DecodeConfig
from .errors import BackendError, ConfigError, NumericalError
from .layout import TokenLayout
from .models.emu3 import STRUCTURE as EMU3_STRUCTURE
from .transformer import Attend, Transformer, TransformerConfig
from .window import JacobiWindow

ATTENTION = "sjd2_engine"  # what the attention function below is called in transformers' register
# What `generate` may have put together; their settings are read from the generation config.
KNOWN_PROCESSORS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")
KNOWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
# Of `generate`'s own making, and nothing that a decode depends on.
IGNORED_INPUTS = ("attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache", "logits_to_keep")

OnTokens = Callable[[list[list[int]]], None]


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    decoder: str = "jacobi",
    window: int = 16,
    cfg_scale: float = 1.0,
    negative_input_ids: Tensor | None = None,
    negative_attention_mask: Tensor | None = None,
    image_sizes: Any = None,
    picture_ids: Sequence[int] | None = None,
    coupling: str = "gumbel",
    repeat_distance: int = 0,
    seed: int | Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
    **model_kwargs: Any,
) -> Any:
    """The loop of `model.generate(custom_generate=generate, …)`: ids int64 [B, P + N], prompt and picture.

    do_sample, temperature, top_k, top_p and max_new_tokens are `generate`'s own; without do_sample the picture is the
    likeliest, token by token. transformers sets top_k=50 where none is given; 0 switches it off.

    decoder, window, coupling, repeat_distance   as in DecodeConfig; every decoder but "sjd2"
    cfg_scale           guidance (`guidance_scale` would add a second, slow one): 1 = none
    negative_input_ids  int64 [B or 1, P'] prompts that guidance leads away from, with their mask; None = the prompt's
                        last token alone, as in transformers
    image_sizes         (height, width) in tokens, or one per row as Emu3's processor gives them, all the same
    picture_ids         every id of a picture, -1 for image tokens: for layouts that are not the model's usual one
    seed                of the picture, or one per row; None = from PyTorch's generator, as `set_seed` left it
    on_tokens           called after every forward pass with each row's new ids, as `streamer` is not passed on

    Raises ConfigError for what cannot be honoured, NumericalError for NaN and infinite logits.
    """
    _check_inputs(input_ids, logits_processor, stopping_criteria, model_kwargs)
    picture = _picture(model, image_sizes, picture_ids, getattr(generation_config, "max_new_tokens", None))
    config = _config(
        generation_config, decoder=decoder, window=window, guidance_scale=cfg_scale, coupling=coupling,
        repeat_distance=repeat_distance,
    )  # fmt: skip
    prompts = _rows(input_ids, model_kwargs.get("attention_mask"))
    if config.guidance_scale != 1.0:
        prompts += _negative(prompts, negative_input_ids, negative_attention_mask)
    table = model.get_input_embeddings()
    ids = torch.tensor(picture.ids, device=table.weight.device)
    source = _Source(
        _text_decoder(model),
        _head(model.get_output_embeddings(), picture.ids[: picture.codes]),
        lambda tokens: table(ids[tokens]),
        [table(prompt.to(ids.device)) for prompt in prompts],
    )
    show = None if on_tokens is None else lambda rows: on_tokens([[picture.ids[i] for i in row] for row in rows])
    tokens = _decode(source, picture.layout, config, _seeds(seed, len(input_ids)), show)
    sequences = torch.cat([input_ids, ids[tokens].to(input_ids.device)], 1)
    if not getattr(generation_config, "return_dict_in_generate", False):
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences))


@dataclass(frozen=True)
class JanusPictures:
    """images: PIL pictures in the order of the prompts; tokens: their codes int64 [B, 576]."""

    images: list[Image.Image]
    tokens: Tensor


@torch.no_grad()
def generate_image(
    model: Any,
    processor: Any,
    prompt: str | Sequence[str],
    decoder: str = "jacobi",
    window: int = 16,
    cfg_scale: float = 5.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    coupling: str = "gumbel",
    repeat_distance: int = 0,
    seed: int | Sequence[int] = 0,
    on_tokens: OnTokens | None = None,
) -> JanusPictures:
    """Pictures of a transformers JanusForConditionalGeneration, as its `generate(generation_mode="image")` draws them.

    temperature=0: the likeliest picture, token by token; other options as in `generate` above. Raises ConfigError and
    NumericalError.
    """
    if model.config.model_type != "janus":
        raise ConfigError(f"generate_image draws with Janus, this is {type(model).__name__}")
    config = DecodeConfig(
        decoder=_usable(decoder), window=window, guidance_scale=cfg_scale, temperature=temperature, top_k=top_k,
        top_p=top_p, coupling=coupling, repeat_distance=repeat_distance,
    )  # fmt: skip
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts = [_janus_prompt(processor, text).to(model.device) for text in texts]
    if config.guidance_scale != 1.0:
        prompts += [_janus_unconditional(model, row) for row in prompts]
    table, codes = model.get_input_embeddings(), model.model.generation_embeddings.num_embeddings
    source = _Source(
        model.model.language_model,
        model.model.generation_head,
        model.prepare_embeddings_for_image_generation,
        [table(row) for row in prompts],
    )
    count = model.model.vision_model.config.num_image_tokens
    tokens = _decode(source, TokenLayout([-1] * count, codes), config, _seeds(seed, len(texts)), on_tokens)
    pixels = model.decode_image_tokens(tokens).float().clamp(-1.0, 1.0).add(1.0).mul(127.5).to(torch.uint8)
    return JanusPictures([Image.fromarray(picture.cpu().numpy()) for picture in pixels], tokens)


@dataclass(frozen=True)
class _Source:
    """A model as the loop needs it.

    decoder   transformers' module of embeddings to hidden states
    head      hidden states -> logits over local image ids
    embed     local ids -> embeddings
    prompts   embeddings [P, D] of every row: the conditional ones, then the unconditional
    """

    decoder: Any
    head: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Tensor]
    prompts: list[Tensor]

    def __call__(self, embeds: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states of embeds [R, T, D], as the engine's own core gives them to its cache."""
        output = self.decoder(inputs_embeds=embeds, position_ids=positions.long(), use_cache=False, sjd2_attend=attend)
        return output.last_hidden_state


def _decode(
    source: _Source, layout: TokenLayout, config: DecodeConfig, seeds: list[int], on_tokens: OnTokens | None
) -> Tensor:
    """Local ids int64 [B, N] of the pictures."""
    prompts, batch = source.prompts, len(seeds)
    lengths = [len(prompt) - 1 for prompt in prompts]
    cache = StaticCache(
        _cache_sizes(source.decoder.config), len(prompts), max(lengths) + len(layout) + config.width, 0,
        prompts[0].device, prompts[0].dtype,
    )  # fmt: skip
    cache.fused = False  # those passes run the engine's own layers
    window = JacobiWindow(config, layout, seeds=seeds, device=prompts[0].device, kv_lengths=cache.lengths)
    core = cast(Transformer, source)
    last = torch.stack([prompt[-1] for prompt in prompts])[:, None]
    with _attending(source.decoder):
        if max(lengths):
            padded = nn.utils.rnn.pad_sequence([prompt[:-1] for prompt in prompts], batch_first=True)
            cache.forward(core, padded)
        cache.lengths.copy_(torch.tensor(lengths))
        while not window.done:
            inputs = window.inputs()
            drafts = source.embed(inputs.tokens.clamp(min=0)).repeat(len(prompts) // batch, 1, 1)
            first = (inputs.positions == -1).repeat(len(prompts) // batch, 1)[..., None]
            logits = source.head(cache.forward(core, torch.where(first, last, drafts)))
            if len(prompts) > batch:
                logits = logits.view(2, batch, *logits.shape[1:])
            accepted = window.step(logits).accepted
            if on_tokens is not None:
                rows = zip(window.tokens, accepted.tolist(), window.lengths.tolist())
                on_tokens([row[end - count : end].tolist() for row, count, end in rows])
    for row, position in enumerate(window.failed.tolist()):
        if position >= 0:
            message = f"NaN or infinite logits: picture {row}, position {position}; load the model in another dtype"
            raise NumericalError(message, image=row, step=int(window.failed_step[row]), position=position)
    return window.tokens


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, sjd2_attend: Attend, **others: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: heads before positions on the way in, behind them on the way out."""
    return sjd2_attend(module.layer_idx, *(x.transpose(1, 2) for x in (query, key, value))), None


@contextmanager
def _attending(decoder: Any) -> Iterator[None]:
    """Let the decoder's layers use `_attention`; what they used before is put back whatever happens."""
    from transformers import AttentionInterface

    devices = {str(parameter.device) for parameter in decoder.parameters()}
    if len(devices) > 1:
        raise BackendError(f"the model lies on {', '.join(sorted(devices))}: load it on one device")
    AttentionInterface.register(ATTENTION, _attention)
    # The setter of transformers would go on to the configurations of other parts.
    before = decoder.config._attn_implementation_internal
    decoder.config._attn_implementation_internal = ATTENTION
    try:
        yield
    finally:
        decoder.config._attn_implementation_internal = before


def _cache_sizes(config: Any) -> TransformerConfig:
    heads = config.num_attention_heads
    return TransformerConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=0.0,  # not the cache's business
        max_position_embeddings=config.max_position_embeddings,
    )


@dataclass(frozen=True)
class _Picture:
    """Local ids: `ids` holds the model's id of each, image tokens first, `codes` of them."""

    ids: list[int]
    codes: int
    layout: TokenLayout


def _check_inputs(input_ids: Tensor, processors: Any, criteria: Any, model_kwargs: dict[str, Any]) -> None:
    if input_ids.shape[1] == 0:
        raise ConfigError("the prompt is empty, or was given as inputs_embeds: give input_ids")
    for name, value in model_kwargs.items():
        empty = value is None or (isinstance(value, dict) and not any(part is not None for part in value.values()))
        if name not in IGNORED_INPUTS and not empty:
            raise ConfigError(f"{name} cannot be used here: prompts are of text alone")
    past = model_kwargs.get("past_key_values")
    if past is not None and int(past.get_seq_length()):
        raise ConfigError("past_key_values holds entries: give the whole prompt instead")
    kinds = ((processors, KNOWN_PROCESSORS, "logits processor"), (criteria, KNOWN_CRITERIA, "stopping criterion"))
    for given, known, kind in kinds:
        for part in given or ():
            name = type(part).__name__
            if name not in known:
                raise ConfigError(
                    f"the {kind} {name} has no effect on windows of tokens: leave it out. Which ids may stand where "
                    "follows from image_sizes or picture_ids; for guidance give cfg_scale instead of guidance_scale"
                )


def _usable(decoder: str) -> str:
    if decoder == "sjd2":
        raise ConfigError("decoder='sjd2' needs weights trained on noise: load their folder by Engine.from_pretrained")
    return decoder


def _config(generation: Any, **options: Any) -> DecodeConfig:
    options["decoder"] = _usable(options["decoder"])
    if (getattr(generation, "num_beams", None) or 1) > 1:
        raise ConfigError(f"num_beams={generation.num_beams}: windows draw one picture per row, without beams")
    if not getattr(generation, "do_sample", False):
        return DecodeConfig(**options, temperature=0.0)
    given = {name: getattr(generation, name, None) for name in ("temperature", "top_k", "top_p")}
    return DecodeConfig(**options, **{name: value for name, value in given.items() if value is not None})


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    return DecodeConfig(seed=seed if isinstance(seed, int) else tuple(seed)).seeds(count)


def _rows(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Prompts without their padding."""
    return list(ids) if mask is None else [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]


def _negative(prompts: list[Tensor], ids: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    if ids is None:
        return [prompt[-1:] for prompt in prompts]
    rows = _rows(ids, mask)
    if len(rows) not in (1, len(prompts)):
        raise ConfigError(f"negative_input_ids has {len(rows)} rows: expected 1 or {len(prompts)}, one per prompt")
    return rows * (len(prompts) // len(rows))


def _text_decoder(model: Any) -> Any:
    return model.model.text_model if model.config.model_type == "emu3" else model.model


def _picture(model: Any, image_sizes: Any, picture_ids: Sequence[int] | None, most: int | None) -> _Picture:
    if model.config.model_type not in ("chameleon", "emu3"):
        raise ConfigError(
            f"{type(model).__name__} is not known here: expected Chameleon or Emu3 (for Janus take generate_image)"
        )
    mapping = model.model.vocabulary_mapping
    image = sorted(mapping.image_tokens)
    if picture_ids is None:
        size = _grid(image_sizes)
        rule = _emu3_ids if model.config.model_type == "emu3" else _chameleon_ids
        picture_ids = rule(model, mapping.vocab_map, size)
    structure = sorted({i for i in picture_ids if i >= 0})
    local = {i: len(image) + n for n, i in enumerate(structure)}
    forced = [local.get(i, -1) for i in picture_ids][:most]
    return _Picture([*image, *structure], len(image), TokenLayout(forced, len(image)))


def _grid(image_sizes: Any) -> tuple[int, int] | None:
    if image_sizes is None:
        return None
    sizes = torch.as_tensor(image_sizes).view(-1, 2).unique(dim=0)
    if len(sizes) != 1:
        raise ConfigError(f"image_sizes={sizes.tolist()}: expected the same (height, width) for every row")
    return int(sizes[0, 0]), int(sizes[0, 1])


def _named(vocabulary: dict[str, int], name: str) -> int:
    if name not in vocabulary:
        raise ConfigError(f"the model's vocabulary_map has no {name!r}: give picture_ids")
    return vocabulary[name]


def _chameleon_ids(model: Any, vocabulary: dict[str, int], size: tuple[int, int] | None) -> list[int]:
    vq = model.config.vq_config
    side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
    height, width = size or (side, side)
    return [-1] * (height * width) + [_named(vocabulary, "<eoss>")]


def _emu3_ids(model: Any, vocabulary: dict[str, int], size: tuple[int, int] | None) -> list[int]:
    if size is None:
        raise ConfigError("image_sizes is missing: pass on what the processor gave for return_for_image_generation")
    height, width = size
    line, *tail = (_named(vocabulary, name) for name in EMU3_STRUCTURE.values())
    return ([-1] * width + [line]) * height + tail


def _head(layer: Any, ids: list[int]) -> Callable[[Tensor], Tensor]:
    """Logits over these ids only; from a part of the matrix, not copied, where they are neighbours."""
    neighbours = ids == list(range(ids[0], ids[0] + len(ids)))
    if type(layer) is nn.Linear and neighbours and layer.weight.device.type != "meta":
        rows = slice(ids[0], ids[0] + len(ids))
        weight, bias = layer.weight[rows], None if layer.bias is None else layer.bias[rows]
        return lambda hidden: F.linear(hidden, weight, bias)
    index = torch.tensor(ids)
    return lambda hidden: layer(hidden)[..., index.to(hidden.device)]


def _janus_prompt(processor: Any, text: str) -> Tensor:
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    given = processor.apply_chat_template(messages, generation_mode="image", add_generation_prompt=True)
    return processor(text=given, generation_mode="image", return_tensors="pt").input_ids[0]


def _janus_unconditional(model: Any, ids: Tensor) -> Tensor:
    """As long as the prompt: padding, which is seen, for all but the marks of the beginning and of the picture."""
    settings = model.generation_config
    kept = (settings.bos_token_id, (settings.generation_kwargs or {}).get("boi_token_id"))
    if None in (*kept, settings.pad_token_id):
        raise ConfigError(
            "model.generation_config lacks bos_token_id, pad_token_id or generation_kwargs['boi_token_id']"
        )
    return torch.where(torch.isin(ids, torch.tensor(kept, device=ids.device)), ids, settings.pad_token_id)
