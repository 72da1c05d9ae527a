#!/usr/bin/env bash
# From raw text to a model you can talk to, in one command:
#
#   bash speedrun_jax.sh                 picks a preset by what it finds
#   PRESET=demo bash speedrun_jax.sh     a small model on the embedded demo data: no GPU, no network, under ten minutes
#   PRESET=gpu bash speedrun_jax.sh      the real thing: depth 20 on fineweb-edu, for a node of 8 H100s
#
# Run it again after an interruption and it goes on where it stopped. Further arguments go to the training command, for
# example: PRESET=demo bash speedrun_jax.sh --num_iterations=50
# Results are kept in $NANOCHAT_BASE_DIR (default ~/.cache/nanochat_jax).
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=dev/setup.sh
source dev/setup.sh

# "The operating system sees an NVIDIA GPU"; whether JAX can use it is checked, and insisted on, by the training command.
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ -z "${PRESET:-}" ]; then
  if [ "${gpus:-0}" -gt 0 ]; then
    PRESET=gpu; why="$gpus NVIDIA GPU(s) found"
  else
    PRESET=demo; why="no NVIDIA GPU found"
  fi
  echo "Preset: $PRESET ($why; set PRESET=demo or PRESET=gpu to choose)"
else
  echo "Preset: $PRESET (as asked)"
fi

case $PRESET in
  demo)
    setup_environment ""
    "$PY" -m scripts.tok_train --demo --vocab_size=2048
    "$PY" -m scripts.train --stage=base --demo --run_name=demo --device=cpu "$@"
    run=demo
    ;;
  gpu)
    setup_environment cuda12
    # depth 20 at 20 tokens per parameter: 11.2 G tokens, about 4.8 characters each, 250 M characters a shard
    "$PY" -m nanochat_jax.data.download -n 240
    "$PY" -m scripts.tok_train --max_chars=2000000000 --vocab_size=65536
    "$PY" -m scripts.tok_eval
    "$PY" -m scripts.train --stage=base --depth=20 --run_name=d20 "$@"
    run=d20
    ;;
  *) die "PRESET=$PRESET is not known; use demo or gpu" ;;
esac

cat <<END

Done. Talk to your model:

  $PY -m scripts.chat --run=$run
  $PY -m scripts.chat --run=$run -p "Once upon a time"
END
