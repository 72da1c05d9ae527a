"""Compares the results of two runs, problem by problem: python -m scripts.compare A B (names, or NAME@STEP)."""

import sys

from nanochat_jax.evals.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
