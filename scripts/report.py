"""Writes the report card: python -m scripts.report [--runs=A,B] [--price_per_hour=24]; --help lists all flags."""

import sys

from nanochat_jax.report.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
