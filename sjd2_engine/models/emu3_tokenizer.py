"""Emu3's text tokenizer as it was first released: byte pairs by rank, in tiktoken's file format."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

RANKS, VISION_TOKENS = "emu3.tiktoken", "emu3_vision_tokens.txt"
# How text is cut before pairs are joined: contractions, words, single digits, punctuation, line ends, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _letters() -> list[str]:
    """A printable character for every byte, as the `tokenizers` library spells them."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as byte pairs with ranks ({error}); fetch it again") from error


def released_tokenizer(folder: Path) -> Any:
    """`tokenizers.Tokenizer` that gives the ids of Emu3's own; raises CheckpointError."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        raise CheckpointError(f"{folder} needs a tokenizer library: pip install 'sjd2-engine[hf]'") from None
    if not (folder / VISION_TOKENS).is_file():
        raise CheckpointError(f"{folder / VISION_TOKENS} is missing: the folder is not a complete checkpoint")
    ranks = _ranks(folder / RANKS)
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    # A piece that is a token is taken whole, even where no sequence of joins leads to it.
    model = models.BPE({spelled[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    special += (folder / VISION_TOKENS).read_text(encoding="utf-8").split("\n")
    tokenizer.add_special_tokens([AddedToken(name.strip(), normalized=False) for name in special if name.strip()])
    return tokenizer
