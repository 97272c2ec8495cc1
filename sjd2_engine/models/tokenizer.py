"""Text tokenizers in the `tokenizers` library's own file format, as most checkpoints carry them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FILES = ("tokenizer.json", "text_tokenizer.json")


def load_tokenizer(folder: Path, names: tuple[str, ...] = FILES) -> Any:
    """`tokenizers.Tokenizer` of a checkpoint folder; CheckpointError where there is none, or it is damaged."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CheckpointError(f"{folder} needs a tokenizer library: pip install 'sjd2-engine[hf]'") from None
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder / names[0]} is missing: copy the tokenizer of the released model there")
    try:
        return Tokenizer.from_file(str(found[0]))
    except Exception as error:  # the library has one exception for everything, and it is Exception
        raise CheckpointError(f"{found[0]} cannot be read ({error}); fetch the checkpoint again") from error
