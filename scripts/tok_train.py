"""Trains the tokenizer: python -m scripts.tok_train --data=PATH | --demo [--vocab_size=N]; --help lists all flags."""

import sys

from nanochat_jax.stages.tokenizer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
