"""Benchmarks: bertdist side by side with its peers on one machine, and what many ranks would lose, computed.

    python -m bench.peers            training, prediction and accuracy against Trainer, a padded loop, pipeline, ONNX Runtime
    python -m bench.scaling          stragglers and all-reduce on 8, 64 and 512 ranks, from real text lengths

Run from the root of the repository, where `bertdist` is installed; `make bench` does both. Nothing of bertdist imports this.
"""
