"""What this machine has, and what keeps training, serving or evaluating from starting: python -m scripts.doctor."""

import sys

from nanochat_jax.hardware.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
