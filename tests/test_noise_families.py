"""Noise training of every family's tiny checkpoint, the checkpoint that it leaves, and sjd2 on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import finetuning

from sjd2_engine import Engine
from sjd2_engine.models.weights import Checkpoint, Origin, Rows
from sjd2_engine.training.export import writable

KINDS = (
    "chameleon", "lumina", "emu3", "emu3-released", "janus", "janus-released", "llamagen-c2i", "llamagen-t2i",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_loaded_and_decoded(kind: str, tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint(kind, tmp_path / "models" / "base" if "emu3" in kind else tmp_path / "base")
    out = tmp_path / "tuned"
    run = finetuning.make_run(kind, folder, out)
    before = {name: weight.clone() for name, weight in run.model.transformer.named_parameters()}
    run.train()
    losses = finetuning.losses(out)
    assert losses[-1] < losses[0]
    run.write()
    # What was trained is in the new checkpoint bit for bit, the rest as it was.
    again = finetuning.load(kind, out)
    trained = writable(Origin.of(again.transformer))
    for name, weight in again.transformer.named_parameters():
        live = run.model.transformer.get_parameter(name)
        assert torch.equal(weight, live), name
        assert torch.equal(before[name], live) == (name not in trained), name
    batch = run.kept.validation(3, 0)
    fresh = finetuning.make_run(kind, out, tmp_path / "other")
    with torch.no_grad():
        assert torch.equal(fresh.objective.eval()(batch).mean, run.objective.eval()(batch).mean)
    load = finetuning.options_of(kind)
    engine = Engine.from_pretrained(str(out), "cpu", image_size=load.image_size, allow_pickle=True)
    text = finetuning.texts_of(kind)[0]
    assert engine.is_tuned and engine.config_for("sjd2").denoise_levels == 3
    result = engine.generate(text, decoder="sjd2", window=6, seed=5)
    assert torch.equal(result.tokens, engine.generate(text, decoder="ar", seed=5).tokens)
    assert max(result.stats.forward_passes) < len(engine.model.layout)


@pytest.mark.parametrize("kind", ["chameleon", "janus-released", "llamagen-c2i"])
def test_untouched_tensors_and_files_stay_as_they_were(kind: str, tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint(kind, tmp_path / "base")
    (folder / "notes").mkdir()
    (folder / "notes" / "licence.txt").write_text("as before")
    (folder / "sjd2.json").write_text('{"levels": 9, "t_min": 0.1}')
    run = finetuning.make_run(kind, folder, tmp_path / "tuned", steps=1)
    run.train()
    run.write()
    out = tmp_path / "tuned"
    assert (out / "notes" / "licence.txt").read_text() == "as before"
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert json.loads((out / "sjd2.json").read_text())["levels"] == 3
    assert not list(out.glob("*.bin")) and not list(out.rglob("*.tmp"))
    # The stored tensors that the transformer is made of.
    core = {part.name for parts in run.origin.sources.values() for part in parts if isinstance(part, Rows)}
    old, new = Checkpoint(folder, allow_pickle=True), Checkpoint(out)
    assert sorted(old.names()) == sorted(new.names())
    stored = {run.origin.checkpoint.stored_name(name) for name in core}
    changed = [name for name in old.names() if not torch.equal(old.read(name), new.read(name))]
    assert changed and set(changed) <= stored
    assert all(old.read(name).dtype == new.read(name).dtype for name in old.names())


def test_tied_tables_are_left_as_they_are(tmp_path: Path) -> None:
    folder = finetuning.write_checkpoint("chameleon", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop("lm_head.weight", None) is not None:
            from safetensors.torch import save_file

            save_file(tensors, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("lm_head.weight", None)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run = finetuning.make_run("chameleon", folder, tmp_path / "tuned", steps=1)
    frozen = {name for name, weight in run.model.transformer.named_parameters() if not weight.requires_grad}
    assert frozen == {"embedding", "head.weight"}
    run.train()
    run.write()
    assert torch.equal(
        finetuning.load("chameleon", tmp_path / "tuned").transformer.embedding,
        finetuning.load("chameleon", folder).transformer.embedding,
    )
