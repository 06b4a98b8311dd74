"""Benchmarks: bertdist compared with its peers on one machine, and its losses at scale, computed.

    python -m bench.peers      training, prediction and accuracy against Trainer, a padded loop,
                               pipeline and ONNX Runtime
    python -m bench.scaling    stragglers and all-reduce on 8, 64 and 512 ranks, from real lengths
    python -m bench.gpu        tests, equality and speed on a CUDA GPU, in one call (docs/gpu.md)

Run from the root of the repository, where `bertdist` is installed; `make bench` does both. Nothing
in bertdist imports this package.
"""
