"""Supervised finetuning: only what the assistant says is learnt, conversations packed whole into rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nanochat_jax.evals.chat_eval import evaluate_categorical
from nanochat_jax.evals.scorer import Scorer
from nanochat_jax.stages import mixtures
from nanochat_jax.stages.pipeline import Parent, batch_flag
from nanochat_jax.stages.supervised import ChatStageSettings, Lesson
from nanochat_jax.stages.supervised import run as run_supervised
from nanochat_jax.training.loop import Evaluation, Outcome
from nanochat_jax.training.schedules import linear_to_zero
from nanochat_jax.utils.flags import flag

PARENTS = ("mid", "base")


@dataclass(frozen=True)
class SftSettings(ChatStageSettings):
    """Flags of --stage=sft; defaults as the reference's, whose 32 conversations a step are about 16,384 tokens."""

    ROWS: ClassVar[int] = 1

    data: Path | None = flag(
        None, "your own conversations (jsonl), learnt instead of the usual mixture; --model_name adds its own"
    )
    device_batch_size: int = batch_flag(ROWS)
    total_batch_size: int = flag(16384, "tokens per optimizer step, padding included")
    init_lr_frac: float = flag(0.02, "all learning rates as a share of pretraining's")
    grad_clip: float = flag(0.0, "largest global gradient norm; 0: no clipping (as the reference)")
    eval_every: int = flag(100, "steps between held-out losses; 0: only at the end")
    eval_tokens: int = flag(100 * 32 * 512, "tokens of held-out conversations per evaluation")
    metrics_every: int = flag(200, "steps between chat accuracies; 0: only at the end")
    metrics_max_problems: int = flag(1024, "problems per chat accuracy")
    sample_every: int = flag(0, "steps between samples; 0: only at the end")
    save_every: int = flag(200, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


@dataclass(frozen=True)
class DemoSftSettings(SftSettings):
    """The same flags with defaults for the demo world on two CPU cores."""

    ROWS: ClassVar[int] = 16

    demo: bool = flag(True, "conversations of the embedded demo world, with these small defaults")
    device_batch_size: int = batch_flag(ROWS)
    total_batch_size: int = flag(4096, "tokens per optimizer step, padding included")
    num_iterations: int = flag(430, "optimizer steps")
    # off: the lesson that finetuning begins with (tasks/demo_world.py) comes suddenly, with 50 times the usual gradient
    spike: float = flag(0.0, "skip a step whose gradient norm is this many times the usual; 0: never")
    init_lr_frac: float = flag(0.8, "all learning rates as a share of pretraining's")
    eval_every: int = flag(150, "steps between held-out losses; 0: only at the end")
    eval_tokens: int = flag(32768, "tokens of held-out conversations per evaluation")
    metrics_every: int = flag(0, "steps between chat accuracies; 0: only at the end")
    metrics_max_problems: int = flag(200, "problems per chat accuracy")
    save_every: int = flag(50, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


def run(settings: SftSettings) -> Outcome:
    """Finetunes, or goes on finetuning, one model."""

    def lesson(parent: Parent) -> Lesson:
        train, val = mixtures.sft(settings, parent, settings.data)

        def evaluations(parent: Parent, mesh) -> tuple[Evaluation, ...]:
            measure = _accuracies(settings, parent, mesh)
            return (Evaluation(measure, settings.metrics_every, at_start=False),) if measure else ()

        momentum = {"momentum_warmup": 0}  # the reference ramps Muon's momentum in base and mid only
        return Lesson("sft", PARENTS, "best_fit", train, val, linear_to_zero, evaluations, momentum)

    return run_supervised(settings, "sft", PARENTS, lesson)


def _accuracies(settings: SftSettings, parent: Parent, mesh):
    """Multiple-choice accuracies during finetuning (reference: MMLU and ARC-Easy), each with the limits of its 95 %
    interval (NAME_low, NAME_high); none for the user's own data."""
    if settings.data is not None:
        return None
    names = {"choice_acc": "world/choice"} if settings.demo else {"mmlu_acc": "MMLU", "arc_easy_acc": "ARC-Easy"}
    problems = {k: mixtures.eval_task(name, settings.task_data) for k, name in names.items()}
    scorers: list[Scorer] = []

    def measure(params) -> dict[str, float]:
        if not scorers:
            scorers.append(Scorer(parent.config, params, mesh=mesh))
        scorers[0].params = params
        numbers: dict[str, float] = {}
        for k, task in problems.items():
            limit = settings.metrics_max_problems
            result = evaluate_categorical(scorers[0], parent.tokenizer, task, max_problems=limit)
            low, high = result["interval"]
            numbers |= {k: result["accuracy"], f"{k}_low": low, f"{k}_high": high}
        return numbers

    return measure
