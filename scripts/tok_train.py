"""Trains the tokenizer: python -m scripts.tok_train --data=PATH | --demo [--vocab_size=N]; --help lists all flags."""

import sys

from nanochat_jax.stages.tok import parse_settings, run, train_tokenizer

if __name__ == "__main__":
    sys.exit(run(lambda: train_tokenizer(parse_settings(sys.argv[1:]))))
