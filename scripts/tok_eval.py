"""Compares the tokenizer's compression with stock encodings: python -m scripts.tok_eval; --help lists all flags."""

import sys

from nanochat_jax import cli
from nanochat_jax.evals.tok import TokEvalSettings, evaluate
from nanochat_jax.stages.tok import run

if __name__ == "__main__":
    settings = cli.parse(TokEvalSettings, sys.argv[1:], __doc__ or "")
    sys.exit(run(lambda: evaluate(settings)))
