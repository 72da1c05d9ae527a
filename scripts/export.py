"""Exports a run: python -m scripts.export --to=hf|reference|safetensors OUT [--run=NAME]; --help lists all flags."""

import sys

from nanochat_jax.convert.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
