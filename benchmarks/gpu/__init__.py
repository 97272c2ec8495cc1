"""Checks and times of every op on a GPU; `benchmarks/gpu_check.py` runs them."""
