"""The counter RNG: published vectors, a Philox written a second time, distributions, and what keys a draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sjd2_kernels import rng

FULL = 0xFFFFFFFF
# Known answers of Random123 (Salmon et al.): counter, key, output.
VECTORS = [
    ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([FULL] * 4, [FULL] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - 2**64 if value >= 2**63 else value


def plain_philox(seed: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, straight from the paper."""
    key = [seed & FULL, seed >> 32 & FULL]
    c = list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ key[0], second & FULL, first >> 32 ^ c[3] ^ key[1], first & FULL]
        key = [key[0] + 0x9E3779B9 & FULL, key[1] + 0xBB67AE85 & FULL]
    return c


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    seed = torch.tensor(signed(key[0] | key[1] << 32))
    words = rng.philox(seed, *(torch.tensor(value) for value in counter))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_against_python_integers_for_many_counters() -> None:
    generator = np.random.default_rng(0)
    seeds = [0, 1, 2**31, 2**32 + 5, 2**63 - 1]
    counters = generator.integers(0, 2**32, (7, 4))
    for seed in seeds:
        columns = torch.from_numpy(counters.astype(np.int64)).unbind(1)
        words = torch.stack(rng.philox(torch.full((1,), seed), *columns), 1)
        assert words.tolist() == [plain_philox(seed, row.tolist()) for row in counters]


def test_uniforms_are_tritons() -> None:
    """`uint_to_uniform_float` on float32, in numpy: x as int32, −x−1 where negative, times the constant."""
    bits = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**31 + 1, FULL, 123456789])
    x = bits.numpy().astype(np.uint32).view(np.int32)
    expected = np.where(x < 0, -x - 1, x).astype(np.float32) * np.float32(4.6566127342e-10)
    got = rng.uniform_from_bits(bits)
    assert got.dtype == torch.float32 and np.array_equal(got.numpy(), expected)
    assert float(got.max()) < 1.0 and float(got.min()) == 0.0


def test_counter_layout() -> None:
    seeds, positions = torch.tensor([5, 2**40 + 1]), torch.tensor([[3, 4, 300], [0, 1, 2]])
    got = rng.uniforms(seeds, positions, torch.tensor([7, 9]), rng.RESIDUAL, 11)
    assert got.shape == (2, 3, 11)
    for row, slot, token in [(0, 0, 0), (0, 2, 10), (1, 1, 5), (1, 2, 7)]:
        counter = [token // 4, int(positions[row, slot]), [7, 9][row], rng.RESIDUAL]
        word = plain_philox(int(seeds[row]), counter)[token % 4]
        assert got[row, slot, token] == rng.uniform_from_bits(torch.tensor(word))


def test_acceptance_draws_are_the_separate_draws() -> None:
    seeds, positions, iteration = torch.tensor([1, 2]), torch.arange(6).view(2, 3), torch.tensor([4, 5])
    u, noise = rng.acceptance_draws(seeds, positions, iteration, 10)
    assert torch.equal(u, rng.uniforms(seeds, positions, iteration, rng.ACCEPT, 1)[..., 0])
    assert torch.equal(noise, rng.gumbel(seeds, positions, iteration, rng.RESIDUAL, 10))


def test_every_key_makes_another_stream() -> None:
    position = torch.tensor([[8]])
    draws = [
        rng.uniforms(torch.tensor([seed]), position + shift, iteration, purpose, 64).flatten()
        for seed in (0, 1, 2**32)
        for shift in (0, 1)
        for iteration in (0, 1)
        for purpose in range(5)
    ]
    stacked = torch.stack(draws)
    assert len(stacked.unique(dim=0)) == len(draws)
    correlation = torch.corrcoef(stacked) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 0.6  # 64 samples each: standard deviation 0.125, 1770 pairs


def test_draws_do_not_depend_on_row_or_slot() -> None:
    seeds, positions = torch.tensor([1, 2, 3]), torch.arange(12).view(3, 4)
    together = rng.gumbel(seeds, positions, 0, rng.SAMPLE, 9)
    for row in range(3):
        for slot in range(4):
            alone = rng.gumbel(seeds[row : row + 1], positions[row : row + 1, slot : slot + 1], 0, rng.SAMPLE, 9)
            assert torch.equal(together[row, slot], alone[0, 0])


def test_distributions() -> None:
    seeds, positions = torch.arange(4), torch.arange(50).expand(4, -1)
    u = rng.uniforms(seeds, positions, 0, rng.SAMPLE, 1000).double()
    g = rng.gumbel(seeds, positions, 0, rng.SAMPLE, 1000).double()
    z = rng.normals(seeds, positions, 0, 1001).double()
    count = u.numel()
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * count) and abs(u.var() - 1 / 12) < 1e-3
    assert abs(g.mean() - 0.5772157) < 0.012 and abs(g.var() - math.pi**2 / 6) < 0.03
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.015 and abs((z**4).mean() - 3) < 0.12
    assert bool(g.isfinite().all()) and bool(z.isfinite().all())
    assert abs(torch.corrcoef(torch.stack((z[..., 0:1000:2].flatten(), z[..., 1:1001:2].flatten())))[0, 1]) < 0.015


def test_gumbel_at_the_ends() -> None:
    g = rng.gumbel_from_uniform(torch.tensor([0.0, 2.0**-31, 0.5, 1 - 2.0**-24]))
    assert bool(g.isfinite().all()) and bool((g[:-1] > g[1:]).all())
    assert g[0] == pytest.approx(33 * math.log(2)) and g[2] == pytest.approx(-math.log(math.log(2)))


def test_gumbel_argmax_draws_from_p() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = rng.gumbel(torch.arange(100), torch.arange(1000).expand(100, -1), 3, rng.SAMPLE, 4)
    counts = torch.bincount((p.log() + noise).argmax(-1).flatten(), minlength=4) / 100_000
    assert float((counts - p).abs().max()) < 0.005
