"""Trains the picture tokenizer: `python -m sjd2_engine.training.vq --out runs/vq --minutes 10`."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..models.scenes_vq import CODE_DIM, CODES, SceneVQ
from .data import draw_pictures

CONTINUOUS_SHARE = 0.1  # of the run spent without quantisation, so that the codebook starts on real vectors
COMMITMENT = 0.25
DECAY = 0.99
MERGE_DISTANCE = 0.9  # codes are about 6.7 long, two codes of a pair that looks different 2 and more apart


class Codebook:
    """Moving-average codebook update (van den Oord et al. 2017, appendix A.1) with restarts of unused codes."""

    def __init__(self, model: SceneVQ) -> None:
        self.model = model
        self.counts = torch.ones(CODES)
        self.sums = torch.zeros(CODES, CODE_DIM)

    def start(self, z: Tensor) -> None:
        """k-means on encoder outputs z [M, 16]."""
        centres = z[torch.randperm(len(z))[:CODES]].clone()
        for _ in range(12):
            self.model.codebook.copy_(centres)
            index = self.model.nearest(z)
            counts = torch.bincount(index, minlength=CODES).float()
            sums = torch.zeros_like(centres).index_add_(0, index, z)
            fresh = z[torch.randint(len(z), (CODES,))]
            centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), fresh)
        self.model.codebook.copy_(centres)
        self.sums, self.counts = centres.clone(), torch.ones(CODES)

    def update(self, z: Tensor, index: Tensor) -> None:
        self.counts.mul_(DECAY).add_(torch.bincount(index, minlength=CODES).float(), alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(torch.zeros_like(self.sums).index_add_(0, index, z), alpha=1 - DECAY)
        self.model.codebook.copy_(self.sums / self.counts[:, None].clamp(min=1e-5))

    def restart_unused(self, z: Tensor) -> int:
        dead = self.counts < 0.02
        fresh = z[torch.randint(len(z), (int(dead.sum()),))]
        self.counts[dead], self.sums[dead] = 1.0, fresh
        self.model.codebook[dead] = fresh
        return int(dead.sum())


def merge_codes(codebook: Tensor, usage: Tensor, distance: float) -> Tensor:
    """Give codes that mean the same one vector: centroids are joined, nearest first, up to `distance`.

    codebook f32 [256, 16], usage [256] counts; returns the new codebook, in which the members of a group are equal, and
    `SceneVQ.encode` always takes the first of them. Without it the encoder picks among near-equal codes by
    chance, and the decoder model spends most of its loss on guessing which.
    """
    centres, weight = codebook.double().clone(), usage.double() + 1e-3
    group = torch.arange(len(codebook))
    alive = torch.ones(len(codebook), dtype=torch.bool)
    while True:
        gaps = torch.cdist(centres, centres).fill_diagonal_(torch.inf)
        gaps[~alive], gaps[:, ~alive] = torch.inf, torch.inf
        nearest, where = gaps.flatten().min(0)
        if nearest > distance:
            return centres[group].float()
        a, b = divmod(int(where), len(codebook))
        centres[a] = (centres[a] * weight[a] + centres[b] * weight[b]) / (weight[a] + weight[b])
        weight[a] += weight[b]
        alive[b] = False
        group[group == b] = a


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 plus squared error plus edges: flat areas stay flat and outlines stay sharp."""
    edges = F.l1_loss(output.diff(dim=-1), target.diff(dim=-1)) + F.l1_loss(output.diff(dim=-2), target.diff(dim=-2))
    return F.l1_loss(output, target) + 2.0 * F.mse_loss(output, target) + 0.5 * edges


def train(out: Path, minutes: float, pictures: int, batch: int, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    data = torch.from_numpy(draw_pictures(pictures, seed))
    model = SceneVQ()
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing from torch's stubs)
    codebook = Codebook(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    quantise, losses, step, begin = False, [], 0, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=round(minutes * 60), unit="s", desc="vq")
    while (elapsed := time.monotonic() - begin) < minutes * 60:
        share = elapsed / (minutes * 60)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share)) + 1e-5
        pixels = data[torch.randint(len(data), (batch,))].permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = model.encoder(pixels).float()
        flat = z.permute(0, 2, 3, 1).reshape(-1, CODE_DIM)
        if not quantise and share > CONTINUOUS_SHARE:
            quantise = True
            codebook.start(flat.detach())
        commitment = torch.zeros(())
        code_input = z
        if quantise:
            index = model.nearest(flat.detach())
            codes = model.codebook[index].clone()
            commitment = F.mse_loss(flat, codes)
            code_input = z + (codes.view(batch, *z.shape[2:], CODE_DIM).permute(0, 3, 1, 2) - z).detach()
            codebook.update(flat.detach(), index)
            if step % 50 == 0 and share < 0.8:
                codebook.restart_unused(flat.detach())
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decoder(code_input).float()
        loss = reconstruction_loss(output, pixels)
        (loss + COMMITMENT * commitment).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        step += 1
        if step % 50 == 0:
            mean = sum(losses[-50:]) / 50
            used = int((codebook.counts > 0.02).sum())
            bar.set_postfix(step=step, loss=f"{mean:.4f}", codes=used, refresh=False)
            bar.update(round(elapsed) - bar.n)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "seconds": round(elapsed), "loss": mean, "codes": used}) + "\n")
        if step % 500 == 0:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "vq.safetensors")
    with torch.no_grad():
        model.cells.copy_(model.codebook)
        model.codebook.copy_(merge_codes(model.codebook, codebook.counts, MERGE_DISTANCE))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "vq.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/vq"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    train(args.out, args.minutes, args.pictures, args.batch, args.rate, args.seed)


if __name__ == "__main__":
    main()
