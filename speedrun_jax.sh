#!/usr/bin/env bash
# From raw text to a chat model and its report card, in one command:
#
#   bash speedrun_jax.sh                 picks a preset by what it finds
#   PRESET=demo bash speedrun_jax.sh     a small model of the embedded demo world: no GPU, no network, a quarter of an hour
#   PRESET=gpu bash speedrun_jax.sh      the real thing: depth 20 on fineweb-edu, for a node of 8 H100s
#
# Every stage goes on where it stopped, and what is done is not done again: after an interruption, run it once more.
# Further arguments go to all training stages, for example: PRESET=demo bash speedrun_jax.sh --num_iterations=50
# MAX_PROBLEMS=100 limits every evaluation. PRICE_PER_HOUR=24 puts dollars on the report.
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

train() { "$PY" -m scripts.train "$@"; }
evaluate() { "$PY" -m scripts.eval "$@" ${MAX_PROBLEMS:+--max_problems="$MAX_PROBLEMS" --max_per_task="$MAX_PROBLEMS"}; }

case $PRESET in
  demo)
    setup_environment ""
    run=demo cpu=(--device=cpu)
    "$PY" -m scripts.tok_train --demo --vocab_size=1024
    train --stage=base --demo --run_name=$run-base "${cpu[@]}" "$@"
    train --stage=mid --demo --source=$run-base --run_name=$run-mid "${cpu[@]}" "$@"
    train --stage=sft --demo --source=$run-mid --run_name=$run-sft "${cpu[@]}" "$@"
    train --stage=rl --demo --source=$run-sft --run_name=$run-rl "${cpu[@]}" "$@"
    for stage in mid sft rl; do
      evaluate --source=$stage --run_name=$run-$stage "${cpu[@]}"
    done
    ;;
  gpu)
    setup_environment cuda12
    run=d20
    # depth 20 at 20 tokens per parameter: 11.2 G tokens, about 4.8 characters each, 250 M characters a shard
    "$PY" -m nanochat_jax.data.download -n 240
    "$PY" -m scripts.tok_train --max_chars=2000000000 --vocab_size=65536
    "$PY" -m scripts.tok_eval
    train --stage=base --depth=20 --run_name=$run-base "$@"
    evaluate --source=base --run_name=$run-base
    train --stage=mid --source=$run-base --run_name=$run-mid "$@"
    evaluate --source=mid --run_name=$run-mid
    train --stage=sft --source=$run-mid --run_name=$run-sft "$@"
    evaluate --source=sft --run_name=$run-sft
    train --stage=rl --source=$run-sft --run_name=$run-rl "$@"
    evaluate --source=rl --run_name=$run-rl --tasks=GSM8K
    ;;
  *) die "PRESET=$PRESET is not known; use demo or gpu" ;;
esac
"$PY" -m scripts.report --runs=$run-base,$run-mid,$run-sft,$run-rl ${PRICE_PER_HOUR:+--price_per_hour="$PRICE_PER_HOUR"}

cat <<END

Done. Talk to your model:

  $PY -m scripts.chat --run=$run-sft
  $PY -m scripts.chat --run=$run-sft -p "Who are you?"
END
