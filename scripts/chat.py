"""Talks to a trained model: python -m scripts.chat [-p "text"] [--run=NAME ...]; --help lists all flags."""

import sys

from nanochat_jax.terminal.app import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
