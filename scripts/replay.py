"""Computes a skipped training step again: python -m scripts.replay RUN [STEP] [--flag=value ...]."""

import sys

from nanochat_jax.training.replay import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
