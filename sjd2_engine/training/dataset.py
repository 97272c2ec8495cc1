"""Draws and encodes pictures of the bundled model's world, with captions, as prepared data (training/store.py).

python -m sjd2_engine.training.dataset --vq runs/vq/vq.safetensors --out runs/data
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.scenes import BEGIN, BEGIN_IMAGE, END_OF_LINE, FIRST_WORD, MAX_WORDS, ScenesModel
from ..models.scenes_vq import CODES, GRID, SceneVQ
from ..models.words import WordTokenizer
from ..scenes.world import WORDS
from ..transformer import Transformer
from .export import STORED
from .prepare import Plan, draw
from .store import Store

ROW = GRID + 1  # tokens per row with its end-of-line token
POSITIONS = GRID * ROW
TOKENIZER = WordTokenizer(WORDS, FIRST_WORD, MAX_WORDS)


def prompt_ids(text: str) -> list[int]:
    """Embedding rows of a caption; "" is the unconditional prompt."""
    return [BEGIN, *TOKENIZER.encode(text), BEGIN_IMAGE]


def load_vq(path: Path) -> SceneVQ:
    """The picture tokenizer with the weights of a file, ready for inference, as a model folder will store them."""
    model = SceneVQ()
    model.load_state_dict({name: tensor.to(STORED).float() for name, tensor in load_file(path).items()})
    return model.eval().requires_grad_(False)


def write(vq: SceneVQ, out: Path, pictures: int, seed: int) -> None:
    """Draw and encode pictures into `out`; goes on where an interrupted run stopped."""
    from .base import SCENES

    core = Transformer.outline(SCENES, FIRST_WORD + len(WORDS), CODES)  # there is no decoder yet, and none is needed
    draw(ScenesModel("scenes", core, vq, list(WORDS), None), out, pictures, Plan(), seed)


@dataclass
class Batch:
    """Token ids of one batch: prompt int64 [B, P], image with end-of-line tokens int64 [B, 272]."""

    prompt: Tensor
    image: Tensor


class TokenData:
    """Encoded pictures in memory; a batch holds captions of one length, so that no padding is needed."""

    def __init__(self, folder: Path, validation: int = 512) -> None:
        stored = Store(folder)
        rows = [stored[i] for i in range(len(stored))]
        prompts = [prompt_ids(caption) for _, caption in rows]
        self.codes = torch.stack([tokens.to(torch.uint8) for tokens, _ in rows])
        self.lengths = torch.tensor([len(ids) for ids in prompts])
        self.prompts = torch.zeros(len(rows), int(self.lengths.max()), dtype=torch.int64)
        for row, ids in zip(self.prompts, prompts):
            row[: len(ids)] = torch.tensor(ids)
        self.size = len(self.codes) - validation
        self.by_length = [torch.nonzero(self.lengths[: self.size] == n)[:, 0] for n in self.lengths.unique()]
        self.share = torch.tensor([float(len(rows)) for rows in self.by_length])

    def rows(self, index: Tensor, captions: bool = True) -> Batch:
        length = int(self.lengths[index[0]])
        prompt = self.prompts[index, :length]
        if not captions:
            prompt = torch.tensor(prompt_ids("")).expand(len(index), -1)
        lines = self.codes[index].long().view(-1, GRID, GRID)
        image = torch.nn.functional.pad(lines, (0, 1), value=END_OF_LINE).flatten(1)
        return Batch(prompt, image)

    def sample(self, size: int, generator: torch.Generator, unconditional: float = 0.1) -> Batch:
        rows = self.by_length[int(torch.multinomial(self.share, 1, generator=generator))]
        index = rows[torch.randint(len(rows), (size,), generator=generator)]
        return self.rows(index, captions=float(torch.rand((), generator=generator)) >= unconditional)

    def validation(self, size: int = 32) -> list[Batch]:
        """The pictures kept apart, in batches of one caption length."""
        kept = torch.arange(self.size, len(self.codes))
        batches = []
        for length in self.lengths.unique():
            rows = kept[self.lengths[kept] == length]
            batches += [self.rows(part) for part in rows.split(size) if len(part)]
        return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vq", type=Path, default=Path("runs/vq/vq.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/data"))
    parser.add_argument("--pictures", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    write(load_vq(args.vq), args.out, args.pictures, args.seed)


if __name__ == "__main__":
    main()
