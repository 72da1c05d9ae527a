"""Serves a trained model on the web: python -m scripts.serve [--run=NAME ...]; --help lists all flags."""

import sys

from nanochat_jax.serve.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
