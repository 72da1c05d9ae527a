"""Imports a model as a run: python -m scripts.import_checkpoint PATH [--run_name=NAME]; --help lists all flags."""

import sys

from nanochat_jax.convert.import_run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
