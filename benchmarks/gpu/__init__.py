"""Parts of the benchmarks for GPUs, `gpu_check.py` and `decode_gpu.py`."""
