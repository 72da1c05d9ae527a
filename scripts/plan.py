"""What a run needs, takes and costs on given GPUs: python -m scripts.plan --depth=20 --gpu=h100 --gpus=8."""

import sys

from nanochat_jax.planner.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
