"""Windows inside transformers' own models: the tokens of their `generate`, the law of their sampling, nothing left."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
import tiny_chameleon
import tiny_emu3
import tiny_janus
import transformers

from sjd2_engine import hf
from sjd2_engine.errors import ConfigError, NumericalError

# Says that max_new_tokens should be given; the length follows from the picture.
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")

ROWS, COLUMNS = 2, 4  # of the pictures of Chameleon and Emu3 here
EMU3 = tiny_emu3.text_vocabulary(True)
CHAMELEON = tiny_chameleon.vocabulary()
TAIL = [EMU3[name] for name in ("<|extra_201|>", "<|image end|>", "<|extra_204|>")]
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]


@pytest.fixture(scope="module")
def chameleon() -> Any:
    return tiny_chameleon.hf_model()


@pytest.fixture(scope="module")
def emu3() -> Any:
    return tiny_emu3.hf_model(hf_names=True)


@pytest.fixture(scope="module")
def janus() -> Any:
    model = tiny_janus.hf_model(pro=True, kv_heads=2)
    # So that pictures have several codes, and depend on their prompts.
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.mul_(4)
    model.model.language_model.norm.weight.mul_(0.3)
    return model


def unmasked(model: Any) -> Any:
    """A copy of a Chameleon that may say image tokens: the class hides them in every forward pass."""
    model = copy.deepcopy(model)
    model.model.vocabulary_mapping.__dict__["image_tokens"] = []
    return model


def padded(prompts: list[list[int]], pad: int) -> dict[str, Tensor]:
    """Inputs of a batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(row)) + row for row in prompts]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def picture_of(kind: str) -> list[list[int]]:
    """Which ids may stand at each position of a picture, written out for these tests."""
    if kind == "chameleon":
        return [tiny_chameleon.image_ids()] * (ROWS * COLUMNS) + [[CHAMELEON["<eoss>"]]]
    image = [i for name, i in EMU3.items() if name.startswith("<|visual token")]
    return [*([image] * COLUMNS + [[EMU3["<|extra_200|>"]]]) * ROWS, *([i] for i in TAIL)]


def likeliest(model: Any, kind: str, scale: float, batch: dict[str, Tensor], negative: dict[str, Tensor]) -> Tensor:
    """`generate` of transformers itself, held to the picture's layout, with its own guidance."""
    picture, start = picture_of(kind), batch["input_ids"].shape[1]
    given = {"guidance_scale": scale} if scale != 1.0 else {}
    if negative:
        given |= {"negative_prompt_ids": negative["input_ids"]}
        given |= {"negative_prompt_attention_mask": negative["attention_mask"]}
    return model.generate(
        **batch, do_sample=False, max_new_tokens=len(picture),
        prefix_allowed_tokens_fn=lambda _, ids: picture[len(ids) - start], **given,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["chameleon", "emu3"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_ids_equal_transformers(kind: str, scale: float, request: pytest.FixtureRequest) -> None:
    """Prompts of different lengths in one batch, and other prompts of different lengths to lead away from."""
    model = request.getfixturevalue(kind)
    pad = model.config.get_text_config().pad_token_id
    batch = padded(PROMPTS, pad)
    negative = padded([[3, 4], [6, 10, 2, 1]], pad) if scale != 1.0 else {}
    oracle = unmasked(model) if kind == "chameleon" else model
    # Their guidance knows no padding in the positions of its second pass: one row at a time there.
    if negative:
        rows = [
            likeliest(oracle, kind, scale, *({"input_ids": torch.tensor([ids])} | mask_of(ids) for ids in pair))
            for pair in zip(PROMPTS, [[3, 4], [6, 10, 2, 1]])
        ]
        expected = [row[0, len(ids) :].tolist() for row, ids in zip(rows, PROMPTS)]
    else:
        expected = likeliest(oracle, kind, scale, batch, negative)[:, batch["input_ids"].shape[1] :].tolist()
    assert expected[0] != expected[1] and len({*expected[0]}) > 3, "such pictures would show nothing"
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for decoder, window in (("ar", 1), ("jacobi", 5), ("sjd", 4), ("coupled", 3)):
        ids = model.generate(
            **batch, custom_generate=hf.generate, decoder=decoder, window=window, cfg_scale=scale,
            negative_input_ids=negative.get("input_ids"), negative_attention_mask=negative.get("attention_mask"),
            image_sizes=[[ROWS, COLUMNS]] * 2, do_sample=False,
        )  # fmt: skip
        assert torch.equal(ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        assert ids[:, batch["input_ids"].shape[1] :].tolist() == expected
    # The model is what it was: its weights, the attention it uses, what it generates.
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    if kind == "emu3" and scale == 1.0:
        assert likeliest(model, kind, scale, batch, {})[:, batch["input_ids"].shape[1] :].tolist() == expected


def mask_of(ids: list[int]) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}


def test_emu3_pictures_decode_as_transformers_does(emu3: Any) -> None:
    ids = emu3.generate(
        **padded(PROMPTS, 0), custom_generate=hf.generate, image_sizes=torch.tensor([[ROWS, COLUMNS]] * 2), seed=3,
        do_sample=True,
    )  # fmt: skip
    pixels = emu3.decode_image_tokens(image_tokens=ids[:, 5:], height=ROWS, width=COLUMNS)
    assert pixels.shape == (2, 3, 8 * ROWS, 8 * COLUMNS)


def test_rows_do_not_depend_on_their_batch(emu3: Any) -> None:
    """The same pictures one by one, though rows accept different counts at each step; seeds are of pictures."""
    batch, options = padded(PROMPTS, 0), {"custom_generate": hf.generate, "image_sizes": (ROWS, COLUMNS)}
    seen: list[list[list[int]]] = []
    given = {"decoder": "coupled", "window": 4, "do_sample": True, "top_k": 0, **options}
    both = emu3.generate(**batch, **given, seed=[8, 9], on_tokens=seen.append)
    counts = [[len(row) for row in step] for step in seen]
    assert any(a != b for a, b in counts)
    for row, prompt in enumerate(PROMPTS):
        alone = emu3.generate(torch.tensor([prompt]), **given, seed=8 + row)
        assert torch.equal(alone[0, len(prompt) :], both[row, 5:])
        assert [i for step in seen for i in step[row]] == both[row, 5:].tolist()


def test_caches_never_run_the_engines_own_layers(emu3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would on CUDA, where the engine's fused passes need its own decoder."""
    options: dict[str, Any] = {"custom_generate": hf.generate, "image_sizes": (ROWS, COLUMNS), "do_sample": False}
    expected = emu3.generate(torch.tensor(PROMPTS[:1]), **options)

    class Eager(hf.StaticCache):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fused = True

    monkeypatch.setattr(hf, "StaticCache", Eager)
    assert torch.equal(emu3.generate(torch.tensor(PROMPTS[:1]), **options), expected)


def test_seeds_and_torchs_own(emu3: Any) -> None:
    given: dict[str, Any] = {"custom_generate": hf.generate, "image_sizes": (ROWS, COLUMNS), "do_sample": True}
    ids = torch.tensor([PROMPTS[0]])
    drawn = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        drawn.append(emu3.generate(ids, **given, top_k=0))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    jacobi, ar = (emu3.generate(ids, **given, decoder=name, window=6, seed=5, top_k=0) for name in ("jacobi", "ar"))
    assert torch.equal(jacobi, ar)


def enumerated(model: Any, prompt: list[int], scale: float, top_k: int, temperature: float) -> dict[Any, float]:
    """Probability of every sequence of three image tokens, by whole sequences through transformers' class."""
    image = sorted(tiny_chameleon.image_ids())[:4]
    rows = [list(codes) for codes in itertools.product(range(4), repeat=3)]

    def logits(start: list[int]) -> Tensor:
        ids = torch.tensor([[*start, *(image[code] for code in row)] for row in rows])
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[:, len(start) - 1 : -1]
            return model.lm_head(hidden)[..., image].double()

    cond, uncond = logits(prompt), logits(prompt[-1:])
    guided = (uncond + scale * (cond - uncond)) / temperature
    kept = guided.topk(top_k, -1).values[..., -1:]
    p = guided.masked_fill(guided < kept, float("-inf")).softmax(-1)
    chosen = p.gather(2, torch.tensor(rows)[..., None]).squeeze(-1).prod(1)
    return {tuple(image[code] for code in row): float(chance) for row, chance in zip(rows, chosen)}


def surprise(drawn: Tensor, law: dict[Any, float]) -> float:
    """How many standard deviations the chi-square statistic of the drawn sequences is off; cells below 5 pooled."""
    counts = {key: 0 for key in law}
    for row in drawn.tolist():
        counts[tuple(row)] += 1
    total = len(drawn)
    large = [key for key, chance in law.items() if chance * total >= 5]
    cells = [(counts[key], law[key] * total) for key in large]
    cells.append((total - sum(n for n, _ in cells), total - sum(mean for _, mean in cells)))
    statistic = sum((n - mean) ** 2 / mean for n, mean in cells if mean > 1e-6)
    if any(n for n, mean in cells if mean <= 1e-6):
        return float("inf")  # sequences were drawn that cannot be
    freedom = len(cells) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("decoder", "coupling"), [("jacobi", "gumbel"), ("sjd", "none"), ("coupled", "maximal")])
def test_sampling_follows_the_law(decoder: str, coupling: str, chameleon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2000 rows in one batch, each a sequence of three tokens out of four, with guidance, temperature and top-k."""
    image = sorted(tiny_chameleon.image_ids())[:4]
    monkeypatch.setitem(chameleon.model.vocabulary_mapping.__dict__, "image_tokens", image)
    ids = torch.tensor([PROMPTS[0]]).repeat(2000, 1)
    drawn = chameleon.generate(
        ids, custom_generate=hf.generate, decoder=decoder, coupling=coupling, window=3, cfg_scale=1.5,
        picture_ids=[-1] * 3, seed=11, do_sample=True, temperature=2.0, top_k=3,
    )  # fmt: skip
    assert abs(surprise(drawn[:, 5:], enumerated(chameleon, PROMPTS[0], 1.5, 3, 2.0))) < 4
    # Such a sample is seen to be wrong under the law of another temperature, and of no guidance.
    assert surprise(drawn[:, 5:], enumerated(chameleon, PROMPTS[0], 1.5, 3, 3.0)) > 6
    assert surprise(drawn[:, 5:], enumerated(chameleon, PROMPTS[0], 1.0, 3, 2.0)) > 6


def test_pictures_may_have_another_layout_and_end_early(chameleon: Any) -> None:
    """As Lumina-mGPT in transformers' class: a token behind every row. `max_new_tokens` cuts the picture."""
    line, end = CHAMELEON["<reserved08799>"], CHAMELEON["<eoss>"]
    picture = ([-1] * 3 + [line]) * 2 + [end]
    ids = torch.tensor([PROMPTS[0]])
    whole = chameleon.generate(ids, custom_generate=hf.generate, picture_ids=picture, seed=1, do_sample=True)[0, 5:]
    assert [whole[3], whole[7], whole[8]] == [line, line, end]
    assert {*whole[:3].tolist(), *whole[4:7].tolist()} <= {*tiny_chameleon.image_ids()}
    part = chameleon.generate(
        ids, custom_generate=hf.generate, picture_ids=picture, seed=1, do_sample=True, max_new_tokens=5,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(part.sequences[0, 5:], whole[:5])
    usual = chameleon.generate(ids, custom_generate=hf.generate, seed=1, do_sample=True)
    assert usual.shape == (1, 5 + 4 * 4 + 1) and usual[0, -1] == end  # 64 pixels by a factor of 16


class Processor:
    """What `generate_image` asks of Janus's processor, which needs torchvision for its pictures."""

    def __init__(self, folder: Any) -> None:
        tiny_janus.write_tokenizer(folder, True)
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def apply_chat_template(self, messages: Any, generation_mode: str, add_generation_prompt: bool) -> str:
        assert generation_mode == "image" and add_generation_prompt
        return f"<|User|>: {messages[0]['content'][0]['text']}\n\n<|Assistant|>:"

    def __call__(self, text: Any, generation_mode: str, return_tensors: str, padding: bool = False) -> Any:
        assert generation_mode == "image"
        texts = [text] if isinstance(text, str) else text
        marked = [one + "<begin_of_image>" for one in texts]
        return self.tokenizer(marked, return_tensors=return_tensors, padding=padding, padding_side="left")


@pytest.fixture
def processor(tmp_path: Any) -> Processor:
    return Processor(tmp_path)


def plain_janus(model: Any, ids: Tensor, scale: float) -> list[int]:
    """Codes of the likeliest picture by whole sequences; every word of the unconditional row is blanked out."""
    settings = model.generation_config
    kept = (ids == settings.bos_token_id) | (ids == settings.generation_kwargs["boi_token_id"])
    rows = torch.stack([ids, torch.where(kept, ids, settings.pad_token_id)])
    embeds, codes = model.get_input_embeddings()(rows), []
    for _ in range(tiny_janus.GRID**2):
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1]
        cond, uncond = model.model.generation_head(hidden)
        codes.append(int((uncond + scale * (cond - uncond)).argmax()))
        new = model.prepare_embeddings_for_image_generation(torch.tensor([codes[-1:]] * 2))
        embeds = torch.cat([embeds, new], 1)
    return codes


def test_janus_equals_its_own_image_mode(janus: Any, processor: Processor) -> None:
    texts = ["owl", "an owl at night"]
    marked = [
        processor.apply_chat_template([{"content": [{"text": text}]}], "image", add_generation_prompt=True)
        for text in texts
    ]
    expected = torch.tensor([plain_janus(janus, processor(text, "image", "pt").input_ids[0], 3.0) for text in marked])
    assert expected[0].tolist() != expected[1].tolist() and len({*expected.flatten().tolist()}) > 3
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):  # 5.0 reads the prompt in every step
        inputs = processor(marked, "image", "pt", padding=True)
        theirs = janus.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, generation_mode="image", do_sample=False,
            guidance_scale=3.0,
        )  # fmt: skip
        assert torch.equal(theirs, expected)
    for decoder in ("ar", "jacobi", "sjd"):
        made = hf.generate_image(janus, processor, texts, decoder=decoder, window=4, cfg_scale=3.0, temperature=0.0)
        assert torch.equal(made.tokens, expected)
    pixels = janus.decode_image_tokens(expected).clamp(-1, 1)
    drawn = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in made.images])
    assert made.images[0].size == pixels.shape[1:3]
    assert float((drawn - (pixels + 1).mul(127.5).flatten(1)).abs().max()) <= 1.0
    sampled = [hf.generate_image(janus, processor, texts[0], seed=4, decoder=name).tokens for name in ("ar", "jacobi")]
    assert torch.equal(*sampled)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale": 3.0}, "UnbatchedClassifierFreeGuidance.*give cfg_scale"),
        ({"repetition_penalty": 1.2}, "RepetitionPenalty"),
        ({"prefix_allowed_tokens_fn": lambda b, ids: [1]}, "PrefixConstrained"),
        ({"max_time": 1.0}, "MaxTimeCriteria"),
        ({"decoder": "sjd2"}, "Engine.from_pretrained"),
        ({"decoder": "sdj"}, "did you mean"),
        ({"image_sizes": [[2, 4], [4, 2]]}, "the same"),
        ({"image_sizes": None}, "image_sizes is missing"),
        ({"negative_input_ids": torch.ones(3, 2, dtype=torch.int64), "cfg_scale": 2.0}, "3 rows"),
        ({"inputs_embeds": torch.zeros(2, 3, 64), "inputs": None}, "give input_ids"),
        ({"seed": [1, 2, 3]}, "3 entries for 2"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_beams": 2}, "without beams"),
    ],
)
def test_what_cannot_be_honoured_is_said(options: dict[str, Any], words: str, emu3: Any) -> None:
    given = {"image_sizes": (ROWS, COLUMNS), "inputs": torch.ones(2, 3, dtype=torch.int64), **options}
    with pytest.raises((ConfigError, ValueError), match=words):
        emu3.generate(**given, custom_generate=hf.generate)


def test_other_prompts_and_models_are_refused(chameleon: Any, janus: Any, emu3: Any, processor: Processor) -> None:
    with pytest.raises(ConfigError, match="prompts are of text alone"):
        chameleon.generate(
            torch.tensor(PROMPTS[:1]), pixel_values=torch.zeros(1, 3, 64, 64), custom_generate=hf.generate
        )
    with pytest.raises(ConfigError, match="past_key_values holds entries"):
        past = emu3(torch.tensor(PROMPTS[:1]), use_cache=True).past_key_values
        hf.generate(emu3, torch.tensor(PROMPTS[:1]), past_key_values=past, image_sizes=(1, 2))
    with pytest.raises(ConfigError, match="generate_image"):
        janus.generate(
            torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 3), custom_generate=hf.generate
        )
    with pytest.raises(ConfigError, match="Emu3ForConditionalGeneration"):
        hf.generate_image(emu3, processor, "a fox")
    broken = copy.deepcopy(janus)
    broken.generation_config.generation_kwargs = None
    with pytest.raises(ConfigError, match="boi_token_id"):
        hf.generate_image(broken, processor, "a fox")


def test_attention_is_put_back_after_an_error(emu3: Any) -> None:
    broken = copy.deepcopy(emu3)
    broken.lm_head.weight = torch.nn.Parameter(torch.full_like(broken.lm_head.weight, float("nan")))
    with pytest.raises(NumericalError, match="picture 0, position 0"):
        broken.generate(torch.ones(1, 3, dtype=torch.int64), custom_generate=hf.generate, image_sizes=(1, 2))
    assert broken.config.text_config._attn_implementation == "sdpa"
    broken.model.text_model.layers[0] = torch.nn.Identity()
    with pytest.raises(Exception):  # noqa: B017  (whatever transformers says)
        broken.generate(torch.ones(1, 3, dtype=torch.int64), custom_generate=hf.generate, image_sizes=(1, 2))
    assert broken.model.text_model.config._attn_implementation == "sdpa"


def test_the_output_matrix_is_not_copied(emu3: Any) -> None:
    image = sorted(emu3.model.vocabulary_mapping.image_tokens)
    head = hf._head(emu3.lm_head, image)
    cells = [cell.cell_contents for cell in head.__closure__ or ()]
    weight = next(cell for cell in cells if isinstance(cell, Tensor) and cell.dim() == 2)
    assert weight.untyped_storage().data_ptr() == emu3.lm_head.weight.untyped_storage().data_ptr()
    hidden = torch.randn(2, 3, 64)
    assert torch.allclose(head(hidden), emu3.lm_head(hidden)[..., image], atol=1e-5)
    apart = hf._head(emu3.lm_head, image[::2])
    assert torch.equal(apart(hidden), emu3.lm_head(hidden)[..., image[::2]])
