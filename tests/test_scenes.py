"""Scenes: captions and pictures agree, some captions stay unseen, and SceneEval tells right from wrong."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sjd2_engine.errors import BackendError, ConfigError
from sjd2_engine.scenes import detection
from sjd2_engine.scenes.captions import (
    caption,
    held_out,
    heldout_prompts,
    sample_prompt,
    sample_training_pair,
    scene_of,
)
from sjd2_engine.scenes.render import render, render_image, signed_distance
from sjd2_engine.scenes.scene_eval import (
    Verdict,
    background_matches,
    detect,
    score,
    score_all,
    summarise,
)
from sjd2_engine.scenes.world import (
    CATEGORIES,
    COLOURS,
    NUMBERS,
    PLURALS,
    RADII,
    RELATIONS,
    SHAPES,
    SIDE,
    TEXTURES,
    TONES,
    Item,
    Phrase,
    Prompt,
    Scene,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def samples(count: int, seed: int):
    """Prompts of the six categories in turn, each with a scene."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        prompt = sample_prompt(rng, CATEGORIES[index % len(CATEGORIES)])
        yield prompt, scene_of(prompt, rng)


def ask(text: str, *phrases: Phrase, category: str = "single object", **rest) -> Prompt:
    return Prompt(text, category, phrases, **rest)


# Captions


def _either(words) -> str:
    return "|".join(words)


PHRASE = (
    rf"(?P<article>an?|{_either(NUMBERS)})(?: (?P<size>small|large))?(?: (?P<colour>{_either(COLOURS)}))?"
    rf" (?P<noun>{_either([*PLURALS.values(), *SHAPES])})"
)
GROUND = rf" on a (?P<texture>{_either(TEXTURES)}) (?P<tone>{_either(TONES)}) background"


def parse(text: str):
    """What a caption says, read by an independent grammar: phrases, relation, texture, tone."""
    ground = re.search(GROUND + "$", text)
    body = text[: ground.start()] if ground else text
    parts = re.split(f" ({_either(['and', *RELATIONS])}) ", body)
    phrases = []
    for part in parts[::2]:
        found = re.fullmatch(PHRASE, part)
        assert found, text
        article, noun = found["article"], found["noun"]
        plural = noun in PLURALS.values()
        assert plural == (article in NUMBERS)
        if not plural:
            assert (article == "an") == (part.split()[1][0] in "aeiou")
        shape = next(s for s in SHAPES if noun in (s, PLURALS[s]))
        phrases.append(Phrase(shape, NUMBERS.get(article, 1), found["colour"], found["size"]))
    link = parts[1] if len(parts) > 1 else None
    texture, tone = (ground["texture"], ground["tone"]) if ground else (None, None)
    return tuple(phrases), None if link == "and" else link, texture, tone


def test_captions_say_their_meaning():
    for prompt, _ in samples(1200, seed=0):
        assert parse(prompt.text) == (prompt.phrases, prompt.relation, prompt.texture, prompt.tone)
        assert prompt.text == caption(prompt.phrases, prompt.relation, prompt.texture, prompt.tone)


def true_of(prompt: Prompt, scene: Scene) -> bool:
    """Whether a caption is true of a scene, from the scene's own numbers; exact counts in every category."""
    groups = [
        [
            item
            for item in scene.items
            if item.shape == phrase.shape and phrase.colour in (None, item.colour) and phrase.size in (None, item.size)
        ]
        for phrase in prompt.phrases
    ]
    if any(len(group) != phrase.count for group, phrase in zip(groups, prompt.phrases)):
        return False
    if prompt.relation:
        (a,), (b,) = groups
        holds = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        if not holds[prompt.relation]:
            return False
    return prompt.texture in (None, scene.texture) and prompt.tone in (None, scene.tone)


def test_captions_are_true_of_their_scenes():
    for prompt, scene in samples(1200, seed=1):
        assert true_of(prompt, scene), prompt.text
        assert len(scene.items) == sum(phrase.count for phrase in prompt.phrases)


def test_held_out_captions_never_occur_in_training():
    rng = np.random.default_rng(2)
    trained = {sample_training_pair(rng)[0].text for _ in range(3000)}
    kept = heldout_prompts(120)
    assert not any(map(held_out, trained))
    assert all(held_out(prompt.text) for prompt in kept)
    assert not trained & {prompt.text for prompt in kept}
    assert Counter(prompt.category for prompt in kept) == dict.fromkeys(CATEGORIES, 20)
    assert heldout_prompts(120) == kept


def test_held_out_captions_are_about_a_tenth():
    texts = {prompt.text for prompt, _ in samples(3000, seed=3)}
    assert 0.07 < sum(map(held_out, texts)) / len(texts) < 0.13


# Pictures


def test_rendering_is_deterministic():
    for (prompt, scene), (again, copy) in zip(samples(30, seed=4), samples(30, seed=4)):
        assert (prompt, scene) == (again, copy)
        pixels = render(scene)
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, render(copy))
        assert np.array_equal(pixels, np.asarray(render_image(copy)))


def test_things_lie_inside_the_picture_and_apart():
    pad = 16
    y, x = np.mgrid[-pad : SIDE + pad, -pad : SIDE + pad] + 0.5
    inner = (slice(pad + 1, pad + SIDE - 1),) * 2
    for _, scene in samples(240, seed=5):
        covers = [signed_distance(i.shape, i.radius, x - i.x, y - i.y) < 0.5 for i in scene.items]
        assert all(cover[inner].sum() == cover.sum() for cover in covers), scene
        assert np.sum(covers, axis=0).max() == 1, scene


@pytest.mark.parametrize("shape", SHAPES)
def test_things_have_their_colour(shape):
    scene = Scene((Item(shape, "pink", "large", 64, 64),), "plain", "black")
    assert (render(scene) == COLOURS["pink"]).all(axis=2).sum() > 500


# SceneEval: seeing


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("shape", SHAPES)
def test_detects_every_shape_colour_and_size(shape, tone):
    for texture, size, colour in zip(TEXTURES * 2, [*RADII, *RADII] * 2, COLOURS):
        (thing,) = detect(render(Scene((Item(shape, colour, size, 60, 68),), texture, tone)))
        assert (thing.shape, thing.colour, thing.size) == (shape, colour, size)
        assert abs(thing.x - 60) < 1.5 and abs(thing.y - 68) < 1.5
        assert thing.radius == pytest.approx(RADII[size], rel=0.08)
        assert 0.9 < thing.confidence <= 1


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("tone", TONES)
def test_sees_nothing_on_bare_backgrounds(texture, tone):
    assert detect(render(Scene((), texture, tone))) == []


def test_ignores_specks_and_holes():
    pixels = render(Scene((Item("star", "blue", "medium", 64, 64),), "dotted", "grey")).copy()
    pixels[62:66, 62:66] = 150  # a hole
    pixels[10:15, 10:15] = COLOURS["red"]  # a speck
    pixels[100, 20:60] = COLOURS["green"]  # a scratch
    (thing,) = detect(pixels)
    assert (thing.shape, thing.colour) == ("star", "blue")


def test_splits_touching_things_by_hue():
    """Red and yellow blend to orange where they meet; no orange thing may appear."""
    items = (Item("square", "red", "medium", 48, 64), Item("circle", "yellow", "medium", 81, 64))
    blurred = render_image(Scene(items, "plain", "white")).resize((64, 64)).resize((SIDE, SIDE))
    assert {(t.shape, t.colour) for t in detect(blurred)} == {("square", "red"), ("circle", "yellow")}


def test_blobs_are_no_shape():
    y, x = np.mgrid[0:SIDE, 0:SIDE] - 64.0
    half_circle = (np.hypot(x, y) < 24) & (x < 0)
    half_ring = (signed_distance("ring", 26, x, y) < 0) & (x < 0)
    ellipse = np.hypot(x / 2, y) < 16
    bar = (np.abs(x) < 30) & (np.abs(y) < 14)
    for blob in (half_circle, half_ring, ellipse, bar):
        pixels = np.full((SIDE, SIDE, 3), 168, np.uint8)
        pixels[blob] = COLOURS["purple"]
        assert [(t.shape, t.colour) for t in detect(pixels)] == [("unknown", "purple")]


# SceneEval: judging


def test_renders_are_judged_right():
    for prompt, scene in samples(420, seed=6):
        verdict = score(render_image(scene), prompt)
        assert verdict.correct, (prompt.text, verdict.reason)
        assert len(verdict.detections) == len(scene.items)
        assert background_matches(render(scene), prompt)


def wrong(prompt: Prompt, rng: np.random.Generator):
    """The same prompt with one thing changed, in every way its category has."""
    index = int(rng.integers(len(prompt.phrases)))
    phrase = prompt.phrases[index]

    def other(options, taken):
        return str(rng.choice([option for option in options if option not in taken]))

    def put(**change):
        phrases = list(prompt.phrases)
        phrases[index] = replace(phrase, **change)
        return replace(prompt, phrases=tuple(phrases))

    yield put(shape=other(SHAPES, [p.shape for p in prompt.phrases]))
    if phrase.colour:
        yield put(colour=other(COLOURS, [phrase.colour]))
    if phrase.size:
        yield put(size=other(RADII, [phrase.size]))
    if prompt.category == "counting":
        yield put(count=int(other([1, 2, 3, 4], [phrase.count])))
    if prompt.relation:
        yield replace(prompt, relation=OPPOSITE[prompt.relation])
    if prompt.category == "colour attribution":
        a, b = prompt.phrases
        yield replace(prompt, phrases=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


def test_wrong_pictures_are_judged_wrong():
    rng = np.random.default_rng(7)
    for prompt, scene in samples(180, seed=7):
        pixels = render(scene)
        for lie in wrong(prompt, rng):
            verdict = score(pixels, lie)
            assert not verdict.correct, (prompt.text, lie, verdict.reason)


def test_pictures_of_other_prompts_are_judged_by_their_truth():
    pairs = list(samples(180, seed=8))
    for (prompt, _), (_, scene) in zip(pairs, pairs[6:] + pairs[:6]):
        asked = replace(prompt, texture=None, tone=None)
        assert score(render(scene), asked).correct == true_of(asked, scene), (prompt.text, scene)


@pytest.mark.parametrize("way", ["blur", "noise"])
def test_judges_through_degradation(way):
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(9)
    right = 0
    for prompt, scene in samples(180, seed=9):
        pixels = render(scene).astype(float)
        if way == "blur":
            pixels = ndimage.gaussian_filter(pixels, (1, 1, 0))
        else:
            pixels += rng.normal(0, 8, pixels.shape)
        right += score(np.clip(np.round(pixels), 0, 255).astype(np.uint8), prompt).correct
    assert right >= 0.97 * 180


def test_counts_are_exact_only_in_counting():
    items = tuple(Item("circle", "red", "small", 24 + 40 * k, 64) for k in range(3))
    pixels = render(Scene(items, "plain", "white"))
    assert score(pixels, ask("a red circle", Phrase("circle", 1, "red"))).correct
    verdict = score(pixels, ask("two red circles", Phrase("circle", 2, "red"), category="counting"))
    assert not verdict.correct
    seen = ", ".join(["small red circle"] * 3)
    assert verdict.reason == f"3 red circles found, 2 asked (seen: {seen})"


def test_relation_is_explained():
    items = (Item("circle", "red", "medium", 32, 64), Item("star", "blue", "medium", 96, 64))
    prompt = ask("a circle right of a star", Phrase("circle"), Phrase("star"), category="position", relation="right of")
    verdict = score(render(Scene(items, "plain", "grey")), prompt)
    assert not verdict.correct and "the circle is not right of the star" in verdict.reason
    assert score(render(Scene(items, "plain", "grey")), replace(prompt, relation="left of")).correct


def test_background_is_judged_apart():
    pixels = render(Scene((Item("ring", "green", "large", 64, 64),), "striped", "black"))
    prompt = ask("a ring", Phrase("ring"), texture="dotted", tone="black")
    assert score(pixels, prompt).correct
    assert not background_matches(pixels, prompt)
    assert background_matches(pixels, replace(prompt, texture="striped"))
    assert not background_matches(pixels, replace(prompt, texture="striped", tone="white"))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((SIDE, SIDE), np.uint8),
        np.zeros((3, SIDE, SIDE), np.uint8),
        np.zeros((SIDE, SIDE, 3), np.float32),
        Image.new("RGB", (256, 256)),
    ],
)
def test_other_pictures_are_refused(image):
    with pytest.raises(ConfigError, match=r"expects uint8 \[128, 128, 3\]"):
        score(image, ask("a ring", Phrase("ring")))


def test_missing_scipy_is_explained(monkeypatch):
    detection._ndimage.cache_clear()
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(BackendError, match=r"sjd2-engine\[eval\]"):
        detect(render(Scene((), "plain", "grey")))


# SceneEval: summing up


def verdicts(right: int, total: int) -> list[Verdict]:
    return [Verdict(k < right, "") for k in range(total)]


def test_summary_has_wilson_intervals_and_the_mean_of_categories():
    summary = summarise({"counting": verdicts(8, 10), "colours": verdicts(100, 100), "position": []})
    assert list(summary.categories) == ["counting", "colours"]
    counting, colours = summary.categories["counting"], summary.categories["colours"]
    assert (counting.low, counting.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (colours.score, colours.high) == (1.0, pytest.approx(1.0)) and 0.96 < colours.low < 0.97
    assert summary.overall.score == pytest.approx(0.9)
    assert summary.overall.low < 0.9 < summary.overall.high <= 1
    assert summary.as_dict() == pytest.approx({"overall": 0.9, "counting": 0.8, "colours": 1.0})


def test_perfect_scores_stay_uncertain():
    few, many = (summarise({c: verdicts(n, n) for c in CATEGORIES}).overall for n in (5, 500))
    assert few.score == many.score == 1 and few.low < many.low < 1


def test_summary_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="No verdicts"):
        summarise({})


def test_score_all_groups_by_category():
    pairs = list(samples(12, seed=10))
    judged = score_all([render(scene) for _, scene in pairs], [prompt for prompt, _ in pairs])
    assert {category: len(part) for category, part in judged.items()} == dict.fromkeys(CATEGORIES, 2)
    assert summarise(judged).overall.score == 1
