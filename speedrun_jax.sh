#!/usr/bin/env bash
# From raw text to a chat model and its report card, in one command:
#
#   bash speedrun_jax.sh                 picks a preset by what it finds
#   PRESET=demo bash speedrun_jax.sh     a small model of the embedded demo world: no GPU, no network, a quarter of an hour
#   PRESET=d24 bash speedrun_jax.sh      the real thing: depth 24 by the modern recipe on ClimbMix, for a node of 8 H100s
#                                        (also PRESET=gpu)
#   PRESET=v1-d20 bash speedrun_jax.sh   the recipe of October 2025: depth 20 on FineWeb-Edu (also PRESET=d20)
#   PRESET=v1-d32 bash speedrun_jax.sh   the same at depth 32, more than ten times the work (also PRESET=d32)
#   PRESET=modern-d12 bash speedrun_jax.sh   the modern recipe at any depth, for fewer or smaller cards (also v1-d12)
#   bash speedrun_jax.sh --plan_only     only prints the commands and, for GPUs, what they need, take and cost
#
# On GPUs it says how long d24 will take and what that costs. Where it would take more than HOURS (24), it chooses the
# depth that does not, and asks before it starts; PRESET is the answer where nobody is there to be asked.
# Every stage resumes where it stopped, and what is done is not done again: after an interruption, run it once more.
# Further arguments go to all training stages, or to one of them: --num_iterations=50, --base.depth=12, --sft.num_epochs=2.
# --model_name=Ada gives the model a name.
# WANDB_RUN=name logs to Weights & Biases and names the runs (name-base, name-mid, ...). MAX_PROBLEMS=100 limits every
# evaluation. PRICE_PER_HOUR=24 puts dollars on the report.
# NANOCHAT_CUDA=13 takes JAX with CUDA 13 (drivers from 580 on) in place of 12.
# Results are kept in $NANOCHAT_BASE_DIR (default ~/.cache/nanochat_jax).
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=dev/setup.sh
source dev/setup.sh

plan_only=
arguments=()
for argument in "$@"; do
  case $argument in
    --plan_only | --plan-only) plan_only=yes ;;
    --plan_only=* | --plan-only=*) die "--plan_only takes no value" ;;
    *) arguments+=("$argument") ;;
  esac
done

# "The operating system sees an NVIDIA GPU"; whether JAX can use it is checked, and insisted on, by the training command.
listed=$(nvidia-smi -L 2>/dev/null || true)
gpus=$(grep -c '^GPU' <<<"$listed" || true)
card=${GPU:-$(sed -n 's/^GPU 0: \(.*\) (UUID.*/\1/p' <<<"$listed")}
cards=${NVIDIA_CARDS:-/proc/driver/nvidia/gpus} # where the driver lists them, whether or not nvidia-smi works
if [ -z "${PRESET:-}" ] && [ "${gpus:-0}" -eq 0 ] && [ -n "$(ls -A "$cards" 2>/dev/null)" ]; then
  die "$cards lists NVIDIA GPUs, but nvidia-smi does not answer. Mend the driver (\`nvidia-smi -L\` must list them), or" \
    "set PRESET=d24 to train on them all the same, PRESET=demo for the small model on the CPU"
fi

# show COMMAND...: on one line, quoted where a shell needs it.
show() {
  local word
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./=:,+@%-]+$ ]]; then printf ' %s' "$word"; else printf ' %q' "$word"; fi
  done
  printf '\n'
}

# Ctrl-C or SIGTERM ends the command at hand, which saves first, and then the script: what follows needs its results.
# Commands run in the background, so that a signal to the script alone reaches them at once.
running=
stopped=
stop() {
  stopped=$1
  if [ "$running" ]; then kill -TERM "$running" 2>/dev/null || true; fi
}
trap 'stop 130' INT
trap 'stop 143' TERM

# step TITLE COMMAND...: runs a command and says how long it took, or only shows it.
step() {
  local title=$1 began=$SECONDS status
  shift
  if [ "$plan_only" ]; then
    printf '%s:\n ' "$title"
    show "$@"
    return
  fi
  printf '\n=== %s\n' "$title"
  "$@" <&0 &
  running=$!
  while true; do # a signal to this script ends `wait`, not the command
    status=0
    wait "$running" || status=$?
    kill -0 "$running" 2>/dev/null || break
  done
  running=
  if [ "$stopped" ]; then
    echo "=== $title: stopped. To resume, run the same command again."
    exit "$stopped"
  fi
  [ "$status" -eq 0 ] || exit "$status"
  local took=$((SECONDS - began))
  printf '=== %s: %d min %02d s\n' "$title" $((took / 60)) $((took % 60))
}

# train STAGE FLAGS...: with the user's arguments at the end; those named --STAGE.flag go to that stage alone.
train() {
  local stage=$1 argument name= own=()
  shift
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    if [ "$stage" = base ]; then # the base model has not been trained yet to say what it is called
      if [ "$name" ]; then name=; continue; fi
      case $argument in
        --model_name=* | --model-name=*) continue ;;
        --model_name | --model-name) name=follows; continue ;;
      esac
    fi
    case $argument in
      --"$stage".*) own+=("--${argument#--"$stage".}") ;;
      --base.* | --mid.* | --sft.* | --rl.*) ;;
      *) own+=("$argument") ;;
    esac
  done
  step "train: $stage" "$PY" -m scripts.train --stage="$stage" "$@" ${WANDB_RUN:+--sinks=wandb} ${own[@]+"${own[@]}"}
}

evaluate() {
  local title=$1
  shift
  step "evaluate: $title" "$PY" -m scripts.eval "$@" \
    ${MAX_PROBLEMS:+--max_problems="$MAX_PROBLEMS" --max_per_task="$MAX_PROBLEMS"}
}

# environment EXTRAS: makes $PY; with --plan_only nothing is installed.
environment() {
  if [ "$plan_only" ]; then PY=${VENV:-.venv}/bin/python; else setup_environment "$1"; fi
}

# gpu_node DEPTH SHARDS TOKENIZER_CHARS: the reference's steps and sizes. SHARDS are for the tokenizer; pretraining
# downloads the others, each while the one before it becomes rows.
gpu_node() {
  local depth=$1 shards=$2 chars=$3
  environment "$extras"
  show_plan --depth="$depth"
  step "download: shards for the tokenizer" "$PY" -m nanochat_jax.data.hub -n "$shards"
  step "tokenizer" "$PY" -m scripts.tok_train --max_chars="$chars" --vocab_size=65536
  step "tokenizer: compression" "$PY" -m scripts.tok_eval
  train base --depth="$depth" --target_param_data_ratio=20 --total_batch_size=524288 --run_name="$run-base"
  evaluate base --source=base --run_name="$run-base"
  train mid --source="$run-base" --run_name="$run-mid"
  evaluate mid --source=mid --run_name="$run-mid"
  train sft --source="$run-mid" --run_name="$run-sft"
  evaluate sft --source=sft --run_name="$run-sft"
  train rl --source="$run-sft" --run_name="$run-rl"
  evaluate rl --source=rl --run_name="$run-rl" --tasks=GSM8K
}

# modern_node FLAGS...: the current recipe, which goes from base straight to finetuning; later stages inherit it.
modern_node() {
  environment "$extras"
  show_plan --recipe=modern "$@"
  step "download: shards for the tokenizer" "$PY" -m nanochat_jax.data.hub -n 8 --repo=climbmix
  step "tokenizer" "$PY" -m scripts.tok_train --recipe=modern
  step "tokenizer: compression" "$PY" -m scripts.tok_eval
  train base --recipe=modern "$@" --run_name="$run-base"
  evaluate base --source=base --run_name="$run-base"
  train sft --source="$run-base" --run_name="$run-sft"
  evaluate sft --source=sft --run_name="$run-sft"
  train rl --source="$run-sft" --run_name="$run-rl"
  evaluate rl --source=rl --run_name="$run-rl" --tasks=GSM8K
}

# gpu_plan FLAGS...: scripts.plan for the GPUs of this machine, or else for 8 H100s.
planned_gpus=$([ "${gpus:-0}" -gt 0 ] && echo "$gpus" || echo 8)
gpu_plan() {
  "$PY" -m scripts.plan "$@" --gpu="${card:-h100}" --gpus="$planned_gpus"
}

# planned FLAGS...: depth, hours and dollars of the plan.
planned() {
  local numbers="import json, sys; p = json.load(sys.stdin); print(p['depth'], p['time']['hours'], p['dollars'])"
  gpu_plan "$@" --compile=False --json | "$PY" -c "$numbers" 2>/dev/null
}

# choose_preset: d24 where that takes at most HOURS on the GPUs found, else the modern recipe at the depth that does.
choose_preset() {
  local most=${HOURS:-24} plan depth hours dollars answer=
  PRESET=d24
  environment "$extras"
  if [ ! -x "$PY" ]; then return; fi # --plan_only before anything is installed
  plan=$(planned --recipe=modern "${d24[@]}") ||
    die "no plan can be made for $gpus x $card: choose yourself, for instance PRESET=modern-d12 (or PRESET=d24)"
  read -r depth hours dollars <<<"$plan"
  printf 'Depth 24 on %s x %s: about %.1f hours, %.0f dollars if rented\n' "$gpus" "$card" "$hours" "$dollars"
  if "$PY" -c "import sys; sys.exit($hours > $most)"; then return; fi
  plan=$(planned --recipe=modern --hours="$most") || die "give more HOURS, or choose a PRESET"
  read -r depth hours dollars <<<"$plan"
  PRESET=modern-d$depth
  printf 'More than HOURS=%s allows. Depth %s: about %.1f hours, %.0f dollars\n' "$most" "$depth" "$hours" "$dollars"
  if [ "$plan_only" ]; then return; fi
  if [ -t 0 ]; then read -r -p "Train depth $depth? [y/N] " answer; fi
  case $answer in
    y | Y | yes) ;;
    *) die "nothing was started. PRESET=$PRESET starts it, PRESET=d24 the longer run, PRESET=demo a small model on the CPU" ;;
  esac
}

# show_plan FLAGS...: what it needs, takes and costs. With --plan_only the programs are compiled for the card.
show_plan() {
  local quick=(--compile=False)
  if [ "$plan_only" ]; then quick=(); fi
  printf 'plan:\n '
  show "$PY" -m scripts.plan "$@" --gpu="${card:-h100}" --gpus="$planned_gpus"
  echo
  if [ ! -x "$PY" ]; then
    echo "(the plan itself needs the project installed: pip install '.[cuda12]')"
  elif ! gpu_plan "$@" ${quick[@]+"${quick[@]}"} && [ "$plan_only" ]; then
    exit 1
  fi
  echo
}

extras="cuda${NANOCHAT_CUDA:-12}${WANDB_RUN:+,wandb}"
d24=(--depth=24 --target_param_data_ratio=8 --total_batch_size=1048576)
if [ -z "${PRESET:-}" ]; then
  if [ "${gpus:-0}" -gt 0 ]; then
    choose_preset; why="$gpus NVIDIA GPU(s) found"
  else
    PRESET=demo; why="no NVIDIA GPU found"
  fi
  echo "Preset: $PRESET ($why; set PRESET=demo, d24, modern-d12, v1-d20 or v1-d32 to choose)"
else
  echo "Preset: $PRESET (as asked)"
fi
[ "$PRESET" = gpu ] && PRESET=d24

run=${WANDB_RUN:-$PRESET}
runs="$run-base,$run-mid,$run-sft,$run-rl"
case $PRESET in
  demo)
    environment "${WANDB_RUN:+wandb}"
    cpu=(--device=cpu)
    step "tokenizer" "$PY" -m scripts.tok_train --demo --vocab_size=1024
    train base --demo --run_name="$run-base" "${cpu[@]}"
    train mid --demo --source="$run-base" --run_name="$run-mid" "${cpu[@]}"
    train sft --demo --source="$run-mid" --run_name="$run-sft" "${cpu[@]}"
    train rl --demo --source="$run-sft" --run_name="$run-rl" "${cpu[@]}"
    for stage in mid sft rl; do
      evaluate $stage --source=$stage --run_name="$run-$stage" "${cpu[@]}"
    done
    ;;
  d24)
    runs="$run-base,$run-sft,$run-rl"
    modern_node "${d24[@]}"
    ;;
  modern-d[1-9]*)
    runs="$run-base,$run-sft,$run-rl"
    modern_node --depth="${PRESET#modern-d}"
    ;;
  v1-d20 | d20) gpu_node 20 8 2000000000 ;;
  v1-d32 | d32) gpu_node 32 16 4000000000 ;;
  v1-d[1-9]*) gpu_node "${PRESET#v1-d}" 8 2000000000 ;;
  *) die "PRESET=$PRESET is not known; use demo, d24 (or gpu), modern-d12, v1-d20, v1-d32 or another depth of these" ;;
esac
step "report" "$PY" -m scripts.report --runs="$runs" \
  ${PRICE_PER_HOUR:+--price_per_hour="$PRICE_PER_HOUR"}
[ "$plan_only" ] && exit

cat <<END

Done. Talk to your model:

  $PY -m scripts.chat --run=$run-sft
  $PY -m scripts.chat --run=$run-sft -p "Who are you?"
  $PY -m scripts.serve --run=$run-sft      in the browser, and for programs
END
