"""Measures inference: python -m scripts.bench_inference [--run=NAME | --depth=12]; --help lists all flags."""

import sys

from nanochat_jax.bench_inference import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
