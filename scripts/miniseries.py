"""Trains a ladder of depths, compares it with another: python -m scripts.miniseries --name=a --depths=2,3 -- FLAGS."""

import sys

from nanochat_jax.stages.miniseries import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
