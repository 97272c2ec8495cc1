"""A decode loop in NumPy: the window's ops on NumPy arrays, through DLPack and without a copy.

    python examples/numpy_window.py

The loop below is what JacobiWindow does in PyTorch, for `jacobi`. The arrays could as well be CuPy's on a GPU.
"""

from __future__ import annotations

import numpy as np

from sjd2_kernels import dlpack, reference, rng

V, N, WINDOW = 32, 48, 12  # image ids, tokens of a picture, slots of the window
SEEDS = np.array([1, 2])
B, PADDED = len(SEEDS), N + WINDOW
FORCED = np.where(np.arange(PADDED) < N, -1, 0)  # no structure tokens; what lies behind the picture counts as forced


class Model:
    """A causal model: logits from a running mean of embeddings. Its cache holds the running sums."""

    def __init__(self) -> None:
        make = np.random.default_rng(0)
        self.embedding = make.standard_normal((V + B, 16)).astype(np.float32)  # the last rows: one prompt each
        self.head = (2.0 * make.standard_normal((16, V))).astype(np.float32)
        self.sums = np.zeros((B, PADDED + 1, 16), np.float32)

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of tokens [B, T] that follow the first lengths[b] entries of each row."""
        logits = np.empty((*tokens.shape, V), np.float32)
        for row, length in enumerate(lengths):
            ids = np.where(tokens[row] < 0, V + row, tokens[row])
            for slot, vector in enumerate(self.embedding[ids]):
                place = length + slot
                self.sums[row, place + 1] = self.sums[row, place] + vector
                logits[row, slot] = np.tanh(self.sums[row, place + 1] / np.sqrt(place + 1)) @ self.head
        return logits


def autoregressive(model: Model) -> np.ndarray:
    """One token per forward pass, drawn with the noise of its seed and position: [B, N]."""
    token, drawn = np.full((B, 1), -1), []
    for position in range(N):
        logits = model(token, np.full(B, position))
        noise = dlpack.gumbel(SEEDS, np.full((B, 1), position), 0, rng.SAMPLE, V)
        token = (logits + noise).argmax(-1)
        drawn.append(token)
    return np.concatenate(drawn, 1)


def windowed(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The same by windows of drafts: tokens [B, N], and forward passes [B]."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((B, *shape), np.int32)

    lengths, steps, done, status = zeros(), zeros(), zeros(), zeros(WINDOW - 1)
    failed, failed_step, levels, q = zeros() - 1, zeros() - 1, zeros(WINDOW - 1) - 1, np.zeros((B, WINDOW - 1, 0), "f4")
    tokens, histogram = np.full((B, PADDED), -1), np.zeros((B, WINDOW + 1), np.int64)
    uniforms = dlpack.uniforms(SEEDS, np.tile(np.arange(PADDED), (B, 1)), 0, rng.INIT, 1)[..., 0]
    initial = np.where(FORCED < 0, (uniforms * V).astype(np.int64), FORCED)
    drafts = initial[:, : WINDOW - 1].copy()
    while not done.all():
        last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[:, None].astype(np.int64), 1)
        inputs = np.concatenate([np.where(lengths[:, None] > 0, last, -1), drafts], 1)
        logits = model(inputs, lengths)
        drawn, p, bad = dlpack.sample_window(
            logits, SEEDS, lengths, steps, noise=None, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0,
            legal_begin=0, legal_end=V, per_position=True, need_p=False,
        )  # fmt: skip
        decided, accepted, settled, fault = dlpack.verify(
            drawn, p, bad, drafts, q, status, levels, FORCED, lengths, steps, done, SEEDS, N, reference.MATCH
        )
        dlpack.commit(
            decided, accepted, fault, tokens, lengths, steps, done, failed, failed_step, histogram,
            np.zeros(0, np.int32), N,
        )  # fmt: skip
        dlpack.refine(
            decided, p, accepted, settled, lengths, FORCED, initial, drafts, status, levels, q,
            None, None, None, None, None, None, None, SEEDS, fresh_level=-1,
        )  # fmt: skip
    return tokens[:, :N], steps


def main() -> None:
    model = Model()
    (tokens, steps), expected = windowed(model), autoregressive(model)
    print(tokens)
    if not np.array_equal(tokens, expected):
        raise SystemExit("the tokens differ from those of the autoregressive loop")
    print(f"equal to the autoregressive loop, in {steps.tolist()} forward passes instead of {N}")


if __name__ == "__main__":
    main()
