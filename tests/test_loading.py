"""Checkpoints and families: what is recognised, read and refused, and how much memory it takes."""

from __future__ import annotations

import gc
import json
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import started
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from sjd2_engine import Engine, TokenLayout, models
from sjd2_engine.cli import app
from sjd2_engine.config import DECODERS
from sjd2_engine.errors import CheckpointError, ConfigError, PromptError
from sjd2_engine.linear import PackedLinear, pack_linears
from sjd2_engine.memory import decode_memory
from sjd2_engine.models.family import ImageModel, LoadOptions, ModelFacts, read_noise, tuned_defaults
from sjd2_engine.models.llama import llama_sources, save_llama, transformer_config
from sjd2_engine.models.weights import Checkpoint, Rows, TokenRows, fill, load_transformer, read_json
from sjd2_engine.transformer import Transformer, TransformerConfig

CPU = torch.device("cpu")
TINY = TransformerConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    rms_norm_eps=1e-6,
    rope_theta=500.0,
    max_position_embeddings=80,
)
VOCABULARY, CODES, SIDE = 30, 20, 4
EOL = 25  # in the checkpoint's own numbering, in which image ids are 3 … 22


class ToyModel(ImageModel):
    """A family made here: prompts are letters, a picture is 4 x 4 tokens with an end-of-line token per row."""

    def __init__(self, name: str, transformer: Transformer, facts: ModelFacts, rows: TokenRows) -> None:
        super().__init__(name, transformer, facts)
        self._rows = rows

    def encode_prompt(self, text: str) -> list[int]:
        return self._rows([1, *(26 + ord(letter) % 4 for letter in text), 2])

    def decode_pixels(self, tokens: Tensor) -> Tensor:
        return tokens.view(-1, SIDE, SIDE, 1).expand(-1, -1, -1, 3).to(torch.uint8)


def describe(folder: Path, options: LoadOptions) -> ModelFacts:
    sizes = transformer_config(read_json(folder / "config.json"), folder / "config.json")
    noise = read_noise(folder)
    defaults = tuned_defaults({"guidance_scale": 2.0, "window": 6}, noise)
    layout = TokenLayout.raster(SIDE, SIDE, image_vocab=CODES)
    return ModelFacts("toy", sizes, VOCABULARY, CODES, (SIDE, SIDE), layout, defaults, 8, 0, noise)


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> ToyModel:
    facts = describe(folder, options)
    rows = TokenRows(VOCABULARY, range(3, 3 + CODES), [EOL])
    sources = llama_sources(facts.transformer, embedding=rows.ids, image_rows=torch.arange(3, 3 + CODES))
    checkpoint = Checkpoint(folder, options.allow_pickle)
    core = load_transformer(checkpoint, facts.transformer, VOCABULARY, CODES, sources, device, dtype)
    return ToyModel(name, core, facts, rows)


@pytest.fixture
def toy_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in the registry is all that a family needs outside its own module."""
    module = types.ModuleType("toy_family")
    module.describe, module.load = describe, load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_family", module)
    monkeypatch.setitem(models.FAMILIES, "toy_family", models.named("ToyForImages"))


def stored_weights() -> dict[str, Tensor]:
    """A random checkpoint in transformers' Llama format."""
    core = Transformer(TINY, VOCABULARY, VOCABULARY)
    core.initialise(1)
    for parameter in core.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return {name: tensor.detach() for name, tensor in _llama_names(core).items()}


def _llama_names(core: Transformer) -> dict[str, Tensor]:
    state, tensors = core.state_dict(), {}
    for name, parts in llama_sources(TINY).items():
        rows = [32, 16, 16] if len(parts) == 3 else len(state[name]) // len(parts)
        labels = [part.name for part in parts if isinstance(part, Rows)]
        tensors |= dict(zip(labels, (piece.contiguous() for piece in state[name].split(rows)), strict=True))
    return tensors


@pytest.fixture
def folder(tmp_path: Path, toy_family: None) -> Path:
    """The toy's checkpoint in three shards."""
    folder = tmp_path / "toy"
    core = Transformer(TINY, VOCABULARY, VOCABULARY)
    core.initialise(0)
    save_llama(core, folder, {"architectures": ["ToyForImages"], "model_type": "other"}, torch.float32)
    tensors = stored_weights()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / shard)
        weight_map |= {name: shard for name in names[i::3]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def test_a_family_needs_its_module_and_one_line(folder: Path) -> None:
    engine = Engine.from_pretrained(str(folder), device="cpu")
    assert (engine.model.family, engine.model_name) == ("toy", "toy")
    expected = engine.generate(["ab", "c"], decoder="ar", seed=3).tokens
    for decoder in ("jacobi", "sjd", "coupled"):
        result = engine.generate(["ab", "c"], decoder=decoder, seed=3)
        assert result.tokens.shape == (2, 16) and all(image.size == (4, 4) for image in result.images if image)
        if decoder == "jacobi":
            assert torch.equal(result.tokens, expected)


def test_shards_single_file_and_pickle_give_the_same_weights(folder: Path) -> None:
    sharded = Engine.from_pretrained(str(folder), device="cpu").model.transformer.embedding
    stored = stored_weights()
    for shard in folder.glob("model*"):
        shard.unlink()
    torch.save({"model": stored}, folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt is a pickled file.*allow_pickle"):
        Engine.from_pretrained(str(folder), device="cpu")
    pickled = Engine.from_pretrained(str(folder), device="cpu", allow_pickle=True).model.transformer.embedding
    save_file(stored, folder / "model.safetensors")
    single = Engine.from_pretrained(str(folder), device="cpu").model.transformer.embedding
    table = stored["model.embed_tokens.weight"]
    ordered = torch.cat([table[3:23], table[EOL:26], table[:3], table[23:EOL], table[26:]])
    for embedding in (sharded, pickled, single):
        assert torch.equal(embedding, ordered)


def test_pickled_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for shard in folder.glob("model*"):
        shard.unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "model.bin")
    for allowed in (False, True):
        with pytest.raises(CheckpointError, match=r"model\.bin"):
            Engine.from_pretrained(str(folder), allow_pickle=allowed)
    assert not (tmp_path / "sprung").exists()


def test_only_one_stored_tensor_is_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    crowd = []
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        tensor = read(self, name)
        crowd.append(sum(other() is not None for other in alive))
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    Engine.from_pretrained(str(folder), device="cpu")
    assert len(crowd) == 3 + 9 * TINY.num_hidden_layers and not any(crowd)


def test_large_checkpoints_show_their_progress(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    Engine.from_pretrained(str(folder), device="cpu")
    assert "loading" not in capsys.readouterr().err
    monkeypatch.setattr("sjd2_engine.models.weights.SHOW_PROGRESS_ABOVE", 1000)
    Engine.from_pretrained(str(folder), device="cpu")
    assert "loading toy" in capsys.readouterr().err


def test_weights_are_cast_on_the_way_in(folder: Path) -> None:
    core = models.load_model(str(folder), CPU, torch.bfloat16).transformer
    assert {parameter.dtype for parameter in core.parameters()} == {torch.bfloat16}
    assert core.cos.dtype == torch.float32
    assert torch.equal(core.norm, stored_weights()["model.norm.weight"].bfloat16())


def _rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shard_of(folder, NORM).unlink(), "{norm} is missing.*fetch"),
        (lambda folder: shard_of(folder, NORM).write_bytes(shard_of(folder, NORM).read_bytes()[:-9]), "{norm} is dam"),
        (lambda folder: shard_of(folder, NORM).write_bytes(b"{}"), "{norm} is damaged"),
        (lambda folder: _rewrite(shard_of(folder, NORM), lambda t: t.pop(NORM)), "{norm} does not hold 'model.norm"),
        (lambda folder: _rewrite(shard_of(folder, GATE), lambda t: t.update(extra=torch.ones(1))), "unexpected.*extra"),
        (
            lambda folder: _rewrite(shard_of(folder, GATE), lambda t: t.update({GATE: t[GATE].to(torch.int8)})),
            "{gate}: 'model.layers.1.mlp.gate_proj.weight' holds I8 numbers.*quantised",
        ),
        (
            lambda folder: _rewrite(shard_of(folder, GATE), lambda t: t.update({GATE: t[GATE][:-1].clone()})),
            r"{gate}: .*gate_proj.weight \+ .*has shape \(95, 32\), config.json asks for \(96, 32\)",
        ),
        (
            lambda folder: _rewrite(shard_of(folder, TABLE), lambda t: t.update({TABLE: t[TABLE][:-1].clone()})),
            "{table}: 'model.embed_tokens.weight' has 29 rows and 30 are needed: its vocabulary",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json has no weight_map"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected an object"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "dreams"}'),
            "no known family.*'dreams'.*known: .*scenes",
        ),
    ],
)
def test_what_is_wrong_is_named_before_memory_is_taken(folder: Path, damage, words: str, monkeypatch) -> None:
    places = {"norm": NORM, "gate": GATE, "table": TABLE}
    for label, name in places.items():
        words = words.replace("{" + label + "}", shard_of(folder, name).name)
    damage(folder)
    monkeypatch.setattr(Transformer, "allocate", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=words):
        Engine.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, "no number"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, "yarn"),
        ({"num_hidden_layers": 4}, "no tensor 'model.layers.3"),
    ],
)
def test_configurations_that_cannot_work(folder: Path, change: dict[str, Any], words: str) -> None:
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words):
        Engine.from_pretrained(str(folder))


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'some/model' could not be fetched.*no route.*give the path"):
        Engine.from_pretrained("some/model")


def test_rows_of_the_input_table() -> None:
    rows = TokenRows(10, range(4, 8), [2])
    assert rows.ids.tolist() == [4, 5, 6, 7, 2, 0, 1, 3, 8, 9]
    assert rows([4, 7, 2, 0, 9]) == [0, 3, 4, 5, 9]
    with pytest.raises(CheckpointError, match="tokenizer gives id 10"):
        rows([3, 10])
    with pytest.raises(CheckpointError, match="up to id 12"):
        TokenRows(10, range(4, 13))


def test_parameters_from_computed_tensors_and_biases(tmp_path: Path) -> None:
    config = replace(TINY, num_hidden_layers=1, qkv_bias=True, head_hidden=24, qk_norm="layer")
    core = Transformer.outline(config, 12, 5)
    given = {name: [torch.randn(p.shape)] for name, p in core.named_parameters()}
    given["embedding"] = [torch.randn(5, 32), torch.randn(7, 32)]
    core.allocate(CPU, torch.float32)
    save_file({"unused": torch.ones(1)}, tmp_path / "empty.safetensors")
    fill(core, Checkpoint(tmp_path / "empty.safetensors"), given)
    assert all(torch.equal(parameter, torch.cat(given[name])) for name, parameter in core.named_parameters())
    hidden = torch.randn(2, 3, 32)
    expected = core.head(hidden)
    assert expected.shape == (2, 3, 5)
    pack_linears(core)
    assert sum(isinstance(module, PackedLinear) for module in core.modules()) == 6
    torch.testing.assert_close(core.head(hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [0, (4,), (4, -4), 1.5, "big"])
def test_image_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ConfigError, match="image_size"):
        LoadOptions(size).size((4, 4))


def test_scenes_have_one_size(base: Engine) -> None:
    assert base.model.facts.image_size == (128, 128)
    with pytest.raises(ConfigError, match="128x128"):
        Engine.from_pretrained("scenes", image_size=256)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention inside the sequence, q [1, T, 4, d], k and v [1, T, 2, d]."""
    q, k, v = (x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class OtherStart(ToyModel):
    """Prompts that end at position 12, and an unconditional one that is learned: it ends in another embedding."""

    def unconditional_embeds(self, text: str, negative_prompt: str) -> Tensor:
        return self.prompt_embeds(text).flip(1)

    def position_offset(self, length: int) -> int:
        return max(0, 12 - length)


def test_learned_unconditional_inputs_and_offsets(folder: Path) -> None:
    """Greedy pictures equal a plain loop over whole sequences, token by token."""
    toy = models.load_model(str(folder), CPU, torch.float32)
    assert isinstance(toy, ToyModel)
    core = toy.transformer
    angle = 3 * torch.rand(80, 4, generator=torch.Generator().manual_seed(1))
    core.set_rope(torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1))
    model = OtherStart("other", core, toy.facts, toy._rows)
    expected = []
    for text in ("ab", "cdefa"):
        cond, uncond = model.prompt_embeds(text), model.unconditional_embeds(text, "")
        tokens = []
        for slot in model.layout.forced:
            positions = 12 - len(text) - 2 + torch.arange(len(cond))
            c, u = (core.head(core(row[None], positions, causal)[0, -1]) for row in (cond, uncond))
            tokens.append(slot if slot >= 0 else int((u + 2.0 * (c - u)).argmax()))
            new = core.embedding[tokens[-1:]]
            cond, uncond = torch.cat([cond, new]), torch.cat([uncond, new])
        expected.append(tokens)
    engine = Engine(model)
    assert len({*expected[0]}) > 3 and expected[0] != expected[1]
    for decoder in ("ar", "jacobi"):
        tokens = engine.generate(["ab", "cdefa"], decoder=decoder, temperature=0.0, window=5).tokens
        assert torch.equal(model.layout.all_tokens(tokens), torch.tensor(expected))
    with pytest.raises(PromptError, match="shorten"):
        engine.generate("a" * 70)
    with pytest.raises(ConfigError, match="at most"):
        engine.generate("ab", decoder="jacobi", window=70)


# ------------------------------------------------------------------ memory


def storage_bytes(*roots: Any) -> int:
    """Bytes of all tensor storages that can be reached from these objects, each counted once."""
    seen, sizes, stack = set(), {}, list(roots)
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            stack += thing.values()
        elif isinstance(thing, (list, tuple)):
            stack += thing
        elif hasattr(thing, "__dict__"):
            stack += vars(thing).values()
    return sum(sizes.values())


@pytest.mark.parametrize("decoder", DECODERS)
def test_memory_by_formula_is_what_a_decode_takes(folder: Path, decoder: str) -> None:
    (folder / "sjd2.json").write_text(json.dumps({"levels": 3, "t_min": 0.3}))
    model = models.load_model(str(folder), CPU, torch.float32)
    config = Engine(model).config_for(decoder)
    model = models.load_model(str(folder), CPU, torch.float32)  # unpacked: oneDNN's weights show no storage
    texts = ["abcdef"] * 3
    with torch.inference_mode():
        decode = started(model, config, texts, [1, 2, 3])
        decode.step()
    gc.collect()
    estimate = decode_memory(model.facts, config, torch.float32, batch=3, device="cpu")
    real = storage_bytes(model.transformer, decode.cache, decode.window)
    assert abs(estimate.total - estimate.one_pass - real) <= 0.05 * real
    assert abs(estimate.cache - storage_bytes(decode.cache)) <= 0.01 * estimate.cache
    state = storage_bytes(decode.window) - model.transformer.embedding.nbytes
    assert estimate.window_state <= state <= 1.4 * estimate.window_state + 4096


def test_doctor_tells_a_model_before_loading_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "allocate", lambda *_: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(app, ["doctor", str(folder), "--json", "--batch", "2", "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["family"], facts["dtype"], facts["image_size"]) == ("toy", "bfloat16", "4x4 px (height x width)")
    assert list(facts["memory_bytes"]) == list(DECODERS)
    need = facts["memory_bytes"]["jacobi"]
    assert need["weights"] == 2 * facts["parameters"] + 2 * 80 * 8 * 4
    assert need["cache"] == 2 * 3 * 4 * (7 + 20 + 6) * 2 * 8 * 2
    shown = CliRunner().invoke(app, ["doctor", str(folder)])
    assert shown.exit_code == 0 and "jacobi" in shown.output and "toy" in shown.output
    refused = CliRunner().invoke(app, ["doctor", str(folder), "--image-size", "12xq"])
    assert refused.exit_code == 2 and "--image-size" in refused.output
