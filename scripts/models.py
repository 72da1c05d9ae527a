"""Lists the models on this disk: python -m scripts.models [--stage=sft] [--json]; --help lists all flags."""

import sys

from nanochat_jax.report.list_runs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
