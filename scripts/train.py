"""Trains one stage: python -m scripts.train --stage=base [--flag=value ...]; --help after the stage lists its flags."""

import sys

from nanochat_jax.stages.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
