"""The metrics of `sjd2 evaluate`: known values, small random backbones, files of scores, and what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from sjd2_engine.errors import BackendError, CheckpointError, ConfigError, PromptError
from sjd2_engine.evaluation.metrics import NAMES, Picture, make_metrics
from sjd2_engine.evaluation.metrics.base import score_each
from sjd2_engine.evaluation.metrics.geneval import GenEval
from sjd2_engine.evaluation.metrics.scene_eval import SceneEval
from sjd2_engine.evaluation.prompts import Case, read_cases, scene_cases
from sjd2_engine.files import save_png
from sjd2_engine.scenes.captions import heldout_prompts, scene_of
from sjd2_engine.scenes.render import render

CPU = torch.device("cpu")
FEATURES = 6


def pictures(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (40, 24)) -> list[Picture]:
    """Random pictures on disk, with prompts."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(count):
        base = generator.integers(0, 200, (1, 1, 3))
        pixels = (base + generator.integers(0, 56, (size[1], size[0], 3))).astype(np.uint8)
        path = save_png(Image.fromarray(pixels), folder / f"{i:03d}.png", {})
        made.append(Picture(i, Case(f"picture number {i}", id=f"p{i}"), 0, path))
    return made


# ------------------------------------------------------------------ FID


class Colours(nn.Module):
    """Mean and deviation of each channel: features that can be computed by hand."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float().flatten(2)
        return torch.cat((y.mean(2), y.std(2)), 1)


class Choosing(nn.Module):
    """Like NVIDIA's file: features only when asked for."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        y = x.float().flatten(2).mean(2)
        if return_features:
            return torch.cat((y, y * y), 1)
        return y


@pytest.fixture
def inception(tmp_path: Path) -> Path:
    path = tmp_path / "colours.pt"
    torch.jit.script(Colours()).save(str(path))
    return path


def by_hand(paths: list[Path]) -> np.ndarray:
    features = []
    for path in paths:
        with Image.open(path) as image:
            x = np.asarray(image.convert("RGB").resize((299, 299), Image.Resampling.BICUBIC), dtype=np.float64)
        flat = x.reshape(-1, 3)
        features.append(np.concatenate((flat.mean(0), flat.std(0, ddof=1))))
    return np.array(features)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    gap = a.mean(0) - b.mean(0)
    first, second = np.cov(a.T), np.cov(b.T)
    return float(gap @ gap + np.trace(first + second - 2 * np.real(sqrtm(first @ second))))


def fid_of(drawn: list[Picture], reference: Path, inception: Path, out: Path):
    (metric,) = make_metrics(["fid"], CPU, inception=inception, reference=reference)
    metric.check([picture.case for picture in drawn], "any")
    return metric.score(drawn, out, iter)


def test_fid_is_that_of_the_formula(inception: Path, tmp_path: Path) -> None:
    drawn, real = pictures(tmp_path / "a", 20), pictures(tmp_path / "b", 17, seed=1, size=(33, 50))
    result = fid_of(drawn, tmp_path / "b", inception, tmp_path)
    wanted = distance(by_hand([p.path for p in drawn]), by_hand([p.path for p in real]))
    assert wanted > 1
    assert result.values["value"] == pytest.approx(wanted, rel=1e-4)
    assert (result.values["pictures"], result.values["real_pictures"], result.values["features"]) == (20, 17, FEATURES)
    assert any("no published FID" in note for note in result.notes)


def test_fid_of_the_same_pictures_is_nothing(inception: Path, tmp_path: Path) -> None:
    drawn = pictures(tmp_path / "a", 12)
    assert fid_of(drawn, tmp_path / "a", inception, tmp_path).values["value"] == pytest.approx(0, abs=0.02)


def test_fid_against_moments_is_that_against_the_pictures(inception: Path, tmp_path: Path) -> None:
    drawn, real = pictures(tmp_path / "a", 9), pictures(tmp_path / "b", 9, seed=3)
    direct = fid_of(drawn, tmp_path / "b", inception, tmp_path).values["value"]
    features = by_hand([p.path for p in real])
    np.savez(tmp_path / "given.npz", mu=features.mean(0), sigma=np.cov(features.T))
    for moments in (tmp_path / "given.npz", tmp_path / "fid_reference.npz"):
        assert fid_of(drawn, moments, inception, tmp_path).values["value"] == pytest.approx(direct, rel=1e-3)


def test_fid_of_few_pictures_says_so(inception: Path, tmp_path: Path) -> None:
    drawn = pictures(tmp_path / "a", FEATURES)
    assert any("too large" in note for note in fid_of(drawn, tmp_path / "a", inception, tmp_path).notes)
    with pytest.raises(ConfigError, match="two at least"):
        fid_of(drawn[:1], tmp_path / "a", inception, tmp_path)


def test_an_extractor_that_gives_features_only_when_asked(tmp_path: Path) -> None:
    torch.jit.script(Choosing()).save(str(tmp_path / "choosing.pt"))
    drawn = pictures(tmp_path / "a", 3)
    assert fid_of(drawn, tmp_path / "a", tmp_path / "choosing.pt", tmp_path).values["features"] == 6


def test_an_exported_extractor(inception: Path, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.zeros(2, 3, 299, 299, dtype=torch.uint8)
    program = torch.export.export(Colours(), (example,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "colours.pt2")
    drawn, _ = pictures(tmp_path / "a", 5), pictures(tmp_path / "b", 6, seed=2)
    values = [
        fid_of(drawn, tmp_path / "b", path, tmp_path).values["value"] for path in (inception, tmp_path / "colours.pt2")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_what_fid_needs_is_named(inception: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    pictures(real, 2)
    with pytest.raises(ConfigError, match="--reference"):
        make_metrics(["fid"], CPU, inception=inception)
    with pytest.raises(ConfigError, match="does not exist"):
        make_metrics(["fid"], CPU, inception=inception, reference=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="two at least"):
        make_metrics(["fid"], CPU, inception=inception, reference=tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"TorchScript.*2048"):
        make_metrics(["fid"], CPU, inception=tmp_path / "none.pt", reference=real)
    (tmp_path / "text.pt").write_text("no module")
    with pytest.raises(CheckpointError, match=r"TorchScript.*2048"):
        make_metrics(["fid"], CPU, inception=tmp_path / "text.pt", reference=real)
    torch.jit.script(nn.Identity()).save(str(tmp_path / "identity.pt"))
    with pytest.raises(CheckpointError, match="maps two pictures to"):
        make_metrics(["fid"], CPU, inception=tmp_path / "identity.pt", reference=real)
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ConfigError, match="gives 6 features"):
        make_metrics(["fid"], CPU, inception=inception, reference=tmp_path / "wrong.npz")


def test_fid_without_any_extractor_names_both_ways(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    try:
        import torch_fidelity  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        pictures(tmp_path / "real", 2)
        with pytest.raises(ConfigError, match=r"--inception.*torch-fidelity"):
            make_metrics(["fid"], CPU, reference=tmp_path / "real")
    else:
        pytest.skip("torch-fidelity is installed: it would fetch its weights")


def test_a_damaged_picture_of_the_reference_is_named(inception: Path, tmp_path: Path) -> None:
    drawn = pictures(tmp_path / "a", 3)
    (tmp_path / "a" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"broken\.jpg"):
        fid_of(drawn, tmp_path / "a", inception, tmp_path)


# ------------------------------------------------------------------ CLIP score


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model of a few thousand parameters, saved as transformers does."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    size = {"height": 32, "width": 32}
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    transformers.CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": len(words) - 1},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_score_is_that_of_the_model(clip: Path, tmp_path: Path) -> None:
    import transformers

    drawn = pictures(tmp_path / "a", 6)
    (metric,) = make_metrics(["clip"], CPU, clip=str(clip))
    result = metric.score(drawn, tmp_path, iter)
    model = transformers.CLIPModel.from_pretrained(clip)
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    wanted = []
    for picture in drawn:
        inputs = processor(
            text=[picture.case.text], images=[picture.open()], return_tensors="pt", truncation=True, max_length=16
        )
        with torch.no_grad():
            found = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds).item()
        wanted.append(100 * max(0.0, cosine))
    records = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    assert [record["clip"] for record in records] == pytest.approx(wanted, abs=1e-4)
    assert [record["id"] for record in records] == [f"p{i}" for i in range(6)]
    assert result.values["mean"] == pytest.approx(float(np.mean(wanted)), abs=1e-4)
    assert result.values["low"] <= result.values["mean"] <= result.values["high"]


def test_what_clip_needs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--clip"):
        make_metrics(["clip"], CPU)
    with pytest.raises(CheckpointError, match=r"no CLIP model at.*preprocessor_config"):
        make_metrics(["clip"], CPU, clip=str(tmp_path))


# ------------------------------------------------------------------ GenEval


def geneval_cases(path: Path, count: int = 2) -> list[Case]:
    lines = [
        {"tag": f"tag{i}", "include": [{"class": "bench", "count": i + 1}], "prompt": f"a photo of {i} benches"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_cases(path)


def sampled(folder: Path, cases: list[Case], samples: int) -> list[Picture]:
    drawn = pictures(folder, len(cases) * samples)
    return [Picture(p.index, cases[p.index // samples], p.index % samples, p.path) for p in drawn]


def test_geneval_layout(tmp_path: Path) -> None:
    cases = geneval_cases(tmp_path / "evaluation_metadata.jsonl")
    drawn = sampled(tmp_path / "a", cases, 3)
    GenEval().check(cases, "any")
    result = GenEval().score(drawn, tmp_path, iter)
    root = tmp_path / "geneval"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    one = ["grid.png", "metadata.jsonl", "samples/0000.png", "samples/0001.png", "samples/0002.png"]
    assert names == [f"{number:05d}/{name}" for number in (0, 1) for name in one]
    given = [json.loads(line) for line in (tmp_path / "evaluation_metadata.jsonl").read_text().splitlines()]
    for number in (0, 1):
        # GenEval reads the file as one JSON document.
        assert json.loads((root / f"{number:05d}" / "metadata.jsonl").read_text()) == given[number]
    assert (root / "00001/samples/0002.png").read_bytes() == drawn[5].path.read_bytes()
    with Image.open(root / "00000/grid.png") as grid:
        assert grid.size == (80, 48)
        assert np.array_equal(np.asarray(grid)[24:, :40], np.asarray(drawn[2].open()))
    assert result.values["scores"] is None and "evaluate_images.py" in result.notes[0]


def test_geneval_results_become_shares(tmp_path: Path) -> None:
    cases = geneval_cases(tmp_path / "evaluation_metadata.jsonl")
    drawn = sampled(tmp_path / "a", cases, 2)
    GenEval().score(drawn, tmp_path, iter)
    results = tmp_path / "geneval" / "results.jsonl"
    lines = [{"filename": "x", "tag": f"tag{i // 2}", "correct": i != 1, "reason": ""} for i in range(4)]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = GenEval().score(drawn, tmp_path, iter).values["scores"]
    assert scores["categories"]["tag0"]["score"] == 0.5 and scores["categories"]["tag1"]["score"] == 1.0
    assert scores["overall"]["score"] == 0.75
    results.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ConfigError, match="1 scores for 4 pictures"):
        GenEval().score(drawn, tmp_path, iter)


def test_geneval_refuses_other_prompts() -> None:
    with pytest.raises(ConfigError, match=r"prompt 1.*evaluation_metadata"):
        GenEval().check([Case("a bench")], "any")


# ------------------------------------------------------------------ SceneEval, prompts, records


def test_scene_eval_of_rendered_captions(tmp_path: Path) -> None:
    cases, prompts = scene_cases(12, 0), heldout_prompts(12, 0)
    drawn = []
    for i, (case, prompt) in enumerate(zip(cases, prompts)):
        shown = prompt if i != 3 else prompts[0]  # picture 3 shows another caption
        pixels = render(scene_of(shown, np.random.default_rng(i)))
        path = save_png(Image.fromarray(pixels), tmp_path / f"{i}.png", {})
        drawn.append(Picture(i, case, 0, path))
    result = SceneEval().score(drawn, tmp_path, iter)
    assert [json.loads(line)["correct"] for line in (tmp_path / "scene_eval.jsonl").read_text().splitlines()] == [
        i != 3 for i in range(12)
    ]
    assert result.values["categories"][cases[3].category]["score"] == 0.5
    assert result.values["overall"]["score"] == pytest.approx(11 / 12)
    assert [finding.what for finding in result.findings][-1] == "overall"


def test_scene_eval_refuses_what_it_cannot_judge() -> None:
    SceneEval().check(scene_cases(6, 0), "scenes")
    with pytest.raises(ConfigError, match="family emu3"):
        SceneEval().check(scene_cases(6, 0), "emu3")
    with pytest.raises(ConfigError, match="--prompt-file"):
        SceneEval().check([Case("a bench")], "scenes")


def test_unknown_metrics_are_named() -> None:
    for names in ([], ["clap"]):
        with pytest.raises(ConfigError, match=", ".join(NAMES)):
            make_metrics(names, CPU)


def test_scores_on_file_are_not_made_again(tmp_path: Path) -> None:
    drawn = pictures(tmp_path / "a", 5)
    asked: list[int] = []

    def score(part):
        asked.extend(picture.index for picture in part)
        return [{"score": picture.index} for picture in part]

    score_each(drawn[:3], tmp_path / "s.jsonl", score, iter, batch=2)
    with open(tmp_path / "s.jsonl", "a") as file:
        file.write('{"index": 3, "sc')  # killed in the middle of a record
    records = score_each(drawn, tmp_path / "s.jsonl", score, iter, batch=2)
    assert asked == [0, 1, 2, 3, 4]
    assert [record["score"] for record in records] == [0, 1, 2, 3, 4]
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 5


def test_prompts_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [
        {"prompt": " a ring\u2028 "},
        {"prompt": "a star", "id": 7, "seed": 3, "metadata": {"split": "x"}, "tag": "counting"},
    ]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    first, second = read_cases(path)
    assert (first.text, first.id, first.seed, first.metadata) == ("a ring", None, None, {})
    assert (second.id, second.seed, second.category) == ("7", 3, "counting")
    assert second.metadata == {"tag": "counting", "split": "x"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is no JSON"),
        ('{"text": "a"}', "no prompt"),
        ("[1]", "no prompt"),
        ('{"prompt": " "}', "no prompt"),
        ('{"prompt": "a", "seed": -1}', "seed=-1"),
        ('{"prompt": "a", "seed": true}', "seed=True"),
        ('{"prompt": "a", "metadata": 3}', "metadata=3"),
    ],
)
def test_a_bad_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(PromptError, match="line 2") as caught:
        read_cases(path)
    assert words in str(caught.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, inception: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "real", 2)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(BackendError, match=r"sjd2-engine\[eval\]"):
        make_metrics(["fid"], CPU, inception=inception, reference=tmp_path / "real")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendError, match=r"sjd2-engine\[eval,hf\]"):
        make_metrics(["clip"], CPU, clip="any")
