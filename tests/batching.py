"""What the tests of `sjd2 batch` share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops
from typer.testing import CliRunner

import sjd2_engine
from sjd2_engine.cli import app
from sjd2_engine.distributed import folder
from sjd2_engine.distributed.plan import Plan, make_plan
from sjd2_engine.distributed.prompts import Item

WEIGHTS = Path(sjd2_engine.__file__).parent / "weights"
PROMPTS = ["a red circle", "a blue ring", "three green stars", "a large red ring", "a green cross"]
Line = dict[str, Any]


def sjd2(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="sjd2")


def plan_for(out: Path, run: str = "run", **given: Any) -> Plan:
    given = {"decoder": "jacobi", "device": "cpu", "options": {"max_batch": 2}, **given}
    return make_plan(given.pop("model", "scenes-sjd2"), out, run, **given)


def items_of(prompts: Sequence[str]) -> list[Item]:
    return [Item(i, str(i), prompt, i) for i, prompt in enumerate(prompts)]


def manifest_of(out: Path) -> list[Line]:
    return [json.loads(line) for line in (out / folder.MANIFEST).read_text().splitlines()]


def times(out: Path) -> dict[str, int]:
    """When each picture was written."""
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.glob("*/*.png")}


def same(a: Path, b: Path) -> bool:
    with Image.open(a) as left, Image.open(b) as right:
        return ImageChops.difference(left.convert("RGB"), right.convert("RGB")).getbbox() is None
