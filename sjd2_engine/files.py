"""Files that are never half-written, folders checked beforehand, pictures that say how they were made."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from .config import DecodeConfig
from .errors import ConfigError

SLUG_LENGTH = 48


def check_writable(folder: str | Path) -> Path:
    """Make the folder if need be and prove that a file can be put there, before anything is computed."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to folder '{folder}' ({error.strerror or error}); choose another with --out"
        ) from error
    return folder


def replace_file(path: str | Path, data: bytes | str) -> Path:
    """Write the whole file under a temporary name in the same folder, then rename it over `path`."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def slug(text: str) -> str:
    """A prompt as part of a file name: lower case, words joined by hyphens, at most 48 characters."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:SLUG_LENGTH].rstrip("-") or "prompt"


def picture_path(folder: Path, index: int, prompt: str, seed: int) -> Path:
    """`000_a-red-circle_seed0.png`: the prompt's place in the run, its words, its seed."""
    return folder / f"{index:03d}_{slug(prompt)}_seed{seed}.png"


def settings_of(config: DecodeConfig) -> dict[str, Any]:
    """The options that decide which picture comes out, seed and batching left out."""
    return {name: value for name, value in asdict(config).items() if name not in ("seed", "max_batch")}


def picture_facts(prompt: str, seed: int, model: str, config: DecodeConfig) -> dict[str, str]:
    """What a PNG says of itself, enough to draw it again."""
    settings = json.dumps(settings_of(config), sort_keys=True)
    return {
        "prompt": prompt,
        "seed": str(seed),
        "decoder": config.decoder,
        "model": model,
        "settings": settings,
    }


def png_bytes(image: Image.Image, facts: Mapping[str, str]) -> bytes:
    """A picture as PNG with `facts` in its text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in facts.items():
        # Plain chunks are Latin-1; other scripts need the international kind.
        (chunks.add_text if text.isascii() else chunks.add_itxt)(key, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, facts: Mapping[str, str]) -> Path:
    """Save a picture with `facts` in its text chunks, making its folder if need be."""
    data = png_bytes(image, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_file(path, data)


def png_facts(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG; empty when there is no such file or it is not a whole picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError):
        return {}
