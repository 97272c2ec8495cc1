"""The window's ops on the CPU, C core against reference: `python benchmarks/test_cpu_ops.py` or plain pytest.

Two shapes: a large model's window with guidance and top-k (W = 96, V = 8192, D = 4096), and the bundled model's
(W = 32, V = 256, D = 256). Threads are torch's. Run as a script, the last line is one JSON document of the medians.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sjd2_kernels import backend, dispatch, ops, reference  # noqa: F401  (registers torch.ops.sjd2)

pytest.importorskip("pytest_benchmark")

SHAPES = {"large": (96, 8192, 4096), "small": (32, 256, 256)}
PADDED, LENGTH, ACCEPTED = 2600, 1000, 4


class Window:
    """One picture in the middle of its decode, drafts tracked and noisy, and the calls on it."""

    def __init__(self, window: int, vocab: int, dim: int) -> None:
        torch.manual_seed(0)
        drafts = window - 1
        self.total, self.vocab = PADDED - window, vocab
        self.seeds, self.forced = torch.tensor([17]), torch.full((PADDED,), -1)
        self.lengths, self.steps, self.done = (torch.tensor([n], dtype=torch.int32) for n in (LENGTH, 250, 0))
        self.logits = torch.randn(2, 1, window, vocab) * 2
        now = self.logits
        self.logits = now + torch.randn_like(now) * 0.3  # the pass before: about half of its drafts will pass
        drawn, before, _ = self.sample()
        self.logits, self.drafts, self.q = now, drawn[:, :-1].clone(), before[:, :-1].clone()
        self.tokens, self.p, self.bad = self.sample()
        self.initial = torch.zeros(1, PADDED, dtype=torch.int64)
        self.status = torch.full((1, drafts), reference.TRACKED, dtype=torch.int32)
        self.clean = torch.full((1, drafts), -1, dtype=torch.int32)
        self.levels = (torch.arange(drafts) // 4 - 2).clamp(-1, 24).int()[None].contiguous()
        self.accepted = torch.tensor([ACCEPTED], dtype=torch.int32)
        self.table, self.noisy = torch.randn(vocab + 1, dim), torch.randn(1, drafts, dim)
        self.mean, self.std, self.ratios = torch.randn(dim), torch.rand(dim) + 0.5, torch.linspace(0.0, 0.9, 25)
        # What refine writes, apart from what verify reads: so every round of each has the same work.
        state = (self.drafts, self.status, self.levels, self.q, self.noisy)
        self.refined = [tensor.clone() for tensor in state]

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        top_k = min(2000, self.vocab // 2)
        return torch.ops.sjd2.sample_window(
            self.logits, self.seeds, self.lengths, self.steps, None, 3.0, 1.0, top_k, 1.0, 0, self.vocab, True, True
        )

    def verify(self, rule: int) -> tuple[Tensor, ...]:
        return torch.ops.sjd2.verify(
            self.tokens, self.p, self.bad, self.drafts, self.q, self.status, self.clean, self.forced, self.lengths,
            self.steps, self.done, self.seeds, self.total, rule,
        )  # fmt: skip

    def refine(self) -> None:
        torch.ops.sjd2.refine(
            self.tokens, self.p, self.accepted, self.accepted, self.lengths, self.forced, self.initial,
            *self.refined, self.table, self.mean, self.std, self.ratios, None, None, self.seeds, 24,
        )  # fmt: skip

    def embed(self) -> Tensor:
        levels = torch.cat((self.clean[:, :1], self.levels), 1)
        return torch.ops.sjd2.embed_window(
            self.tokens, levels, self.table, self.table[:1], self.noisy, self.mean, self.std
        )

    def step(self) -> None:
        """sample + verify (coupled, the dearest rule) + refine."""
        self.sample()
        self.verify(reference.COUPLED)
        self.refine()


CALLS: dict[str, Callable[[Window], Any]] = {
    "sample_window": Window.sample,
    "verify_ratio": lambda window: window.verify(reference.RATIO),
    "verify_coupled": lambda window: window.verify(reference.COUPLED),
    "refine": Window.refine,
    "embed_window": Window.embed,
    "sample+verify+refine": Window.step,
}


@pytest.fixture(scope="module", params=SHAPES)
def window(request: pytest.FixtureRequest) -> tuple[str, Window]:
    return request.param, Window(*SHAPES[request.param])


@pytest.mark.parametrize("name", ["c", "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_op(benchmark: Any, window: tuple[str, Window], call: str, name: str) -> None:
    shape, state = window
    chosen, why = dispatch.choice("sample_window", "cpu")
    if name == "c" and chosen != "c":
        pytest.skip(why)
    benchmark.group = f"{shape} {call}"
    with backend(name):
        benchmark.pedantic(CALLS[call], (state,), rounds=7 if shape == "large" else 50, warmup_rounds=2)


def main() -> None:
    """Measure, print pytest-benchmark's table and then the medians in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = pytest.main([__file__, "-q", "--benchmark-columns=min,median,max", f"--benchmark-json={report}"])
        if code:
            sys.exit(code)
        medians: dict[str, dict[str, float]] = {}
        for result in json.loads(report.read_text())["benchmarks"]:
            medians.setdefault(result["group"], {})[result["params"]["name"]] = 1e3 * result["stats"]["median"]
    print(json.dumps({"threads": torch.get_num_threads(), "milliseconds": medians}))


if __name__ == "__main__":
    main()
