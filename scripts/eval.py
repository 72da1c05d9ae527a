"""Evaluates a trained model: python -m scripts.eval --source=base|mid|sft|rl [--tasks=...]; --help lists all flags."""

import sys

from nanochat_jax.evals.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
