"""The prompts of a batch: a JSONL or text file, checked line by line before anything starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MAX_SEED
from ..errors import PromptError

KEYS = ("prompt", "id", "seed", "negative_prompt")
SHOWN = 5  # broken lines that a message names


@dataclass(frozen=True, slots=True)
class Item:
    """One picture to draw: its place among the prompts, its name, and what decides how it looks."""

    index: int
    id: str
    prompt: str
    seed: int
    negative_prompt: str | None = None


def read_items(path: str | Path, seed: int = 0) -> list[Item]:
    """The prompts of a .jsonl, .ndjson or .txt file; prompt i without a seed of its own has seed + i.

    A JSON line is an object with "prompt" and optionally "id", "seed" and "negative_prompt"; empty lines are skipped.
    Raises PromptError, which names the broken lines.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".ndjson", ".txt"):
        raise PromptError(
            f"'{path}': expected a .jsonl file (one JSON object per line) or a .txt file (one prompt per line)"
        )
    items: list[Item] = []
    first_line: dict[str, int] = {}
    broken: list[str] = []
    for number, raw in _lines(path):
        try:
            fields = _object(raw) if path.suffix != ".txt" else {"prompt": raw.decode("utf-8")}
            item = _item(fields, len(items), seed)
        except (ValueError, RecursionError) as error:  # of UTF-8 and JSON too
            broken.append(f"line {number}: {error}")
            continue
        if (before := first_line.setdefault(item.id, number)) != number:
            broken.append(f"line {number}: id {item.id!r} is that of line {before} already")
        items.append(item)
    if broken:
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise PromptError(f"'{path}' has {len(broken)} broken line(s): {'; '.join(broken[:SHOWN])}{more}")
    if not items:
        raise PromptError(f"'{path}' holds no prompt")
    return items


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of every line that is not empty; only a newline ends a line, as JSONL has it."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if raw.strip():
                    yield number, raw.strip()
    except OSError as error:
        raise PromptError(f"cannot read prompts from '{path}' ({error.strerror or error})") from error


def _object(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(fields, dict):
        raise ValueError(f'expected an object like {{"prompt": …}}, got {type(fields).__name__}')
    for name in fields:
        if name not in KEYS:
            close = difflib.get_close_matches(name, KEYS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(KEYS)}"
            raise ValueError(f"unknown key {name!r}{hint}")
    if "prompt" not in fields:
        raise ValueError('no "prompt"')
    return fields


def _item(fields: dict[str, Any], index: int, first_seed: int) -> Item:
    prompt, negative = fields["prompt"], fields.get("negative_prompt")
    for name, text in (("prompt", prompt), ("negative_prompt", "" if negative is None else negative)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}; expected a text")
        text.encode("utf-8")  # half of a surrogate pair cannot be written anywhere
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    seed = fields.get("seed")
    if seed is None:
        seed = (first_seed + index) % (MAX_SEED + 1)
    elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed!r}; expected an integer from 0 to 2**63 - 1")
    name = fields.get("id")
    if name is None:
        name = index
    elif isinstance(name, bool) or not isinstance(name, (int, str)) or name == "":
        raise ValueError(f"id is {name!r}; expected a text or an integer")
    str(name).encode("utf-8")
    return Item(index, str(name), prompt, seed, negative)
