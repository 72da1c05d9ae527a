"""Compares the tokenizer's compression with stock encodings: python -m scripts.tok_eval; --help lists all flags."""

import sys

from nanochat_jax.evals.compression import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
