"""The flags that stages share. A flag is declared once; other defaults of a stage are instances (DEFAULTS, DEMO)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.parallel import cluster
from nanochat_jax.planner.plan import TOTAL_BATCH_SIZE
from nanochat_jax.training.job import MODEL_NAME, TrainSettings
from nanochat_jax.training.optim import OptimHyper
from nanochat_jax.utils.flags import flag

DEMO_ROWS = 16  # per device and micro-step, with --demo on a CPU


@dataclass(frozen=True)
class StageSettings(TrainSettings):
    """Every stage: run, length, devices. Names and defaults are the reference's where it has them."""

    run_name: str = flag(
        "",
        "name of the run's folder; default: base-d<depth>, in later stages the parent's name with the stage at its end",
        free=True,
        reference={
            "run": "it is --run_name here",
            "model_tag": "it is --run_name here, and --source for the run to start from",
        },
    )
    total_batch_size: int = flag(
        TOTAL_BATCH_SIZE,
        "tokens per optimizer step, padding included, reached by accumulation",
        unused_by=("rl",),
        reference={"target_examples_per_step": "it is --total_batch_size here, in tokens"},
    )
    num_iterations: int = flag(
        -1,
        "optimizer steps; -1: from target_flops or target_param_data_ratio in base, from num_epochs in later stages",
        decides="num_iterations",
    )
    eval_tokens: int = flag(
        20 * TOTAL_BATCH_SIZE,
        "tokens of held-out text per evaluation",
        free=True,
        unused_by=("rl",),
        reference={"eval_steps": "it is --eval_tokens here, in tokens"},
    )
    remat: str = flag(
        "none", "activations recomputed in the backward pass", choices=("none", "mlp", "block"), free=True
    )
    device: str = flag(
        "auto",
        "where to run",
        choices=("auto", "cpu", "gpu"),
        free=True,
        reference={"device_type": "it is --device here (auto, cpu or gpu)"},
    )
    distributed: str = flag("auto", "where the processes of a job are described", choices=cluster.MODES, free=True)
    fsdp: int = flag(1, "devices over which parameters are sharded, too", free=True)
    tensor: int = flag(1, "devices over which heads, hidden units and vocabulary are sharded", free=True)
    demo: bool = flag(False, "the embedded demo world, with small defaults (they change with this flag)")


@dataclass(frozen=True)
class ChatStageSettings(StageSettings):
    """Stages that start from a model (mid, sft, rl)."""

    source: str = flag("", "run to start from; default: the newest of the stage before", decides="parent")
    source_step: int | None = flag(None, "checkpoint of the source to start from; default: its last", decides="parent")
    max_seq_len: int = flag(0, "tokens per row; 0: the parent's context length", unused_by=("rl",))
    num_epochs: int = flag(1, "passes over the conversations", decides="num_iterations")
    init_lr_frac: float = flag(OptimHyper.init_lr_frac, "all learning rates as a share of pretraining's")
    task_data: Path | None = flag(
        None, "folder with the data sets, instead of downloading them (see tasks/hub.py)", decides="rows"
    )
    model_name: str = flag(
        "",
        f"the name the model is taught to give when asked who it is; default: the source's, at first {MODEL_NAME}",
        unused_by=("rl",),
    )


def compared(settings: TrainSettings, stage: str) -> set[str]:
    """The flags that must have the same values when a run of `stage` is resumed."""
    return {
        f.name
        for f in dataclasses.fields(settings)
        if not (f.metadata["free"] or f.metadata["decides"] or stage in f.metadata["unused_by"])
    }
