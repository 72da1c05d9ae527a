"""Supervised finetuning: only what the assistant says is trained on, each conversation within one row."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanochat_jax.evals.chat_eval import evaluate_categorical
from nanochat_jax.evals.scorer import Scorer
from nanochat_jax.parallel import multihost
from nanochat_jax.planner.plan import TOTAL_BATCH_SIZE
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages import mixtures
from nanochat_jax.stages.pipeline import child_run, open_devices, open_parent
from nanochat_jax.stages.settings import ChatStageSettings
from nanochat_jax.stages.supervised import make_job, make_rows, train_on
from nanochat_jax.training.job import Evaluation, Outcome, Parent, of_recipe
from nanochat_jax.training.schedules import late_decay, linear_to_zero
from nanochat_jax.utils.flags import flag

PARENTS = ("mid", "base")
ROWS = 1  # per device and micro-step, where nothing says how many fit


@dataclass(frozen=True)
class SftSettings(ChatStageSettings):
    """Finetuning: own data, chat accuracies."""

    data: Path | None = flag(
        None, "your own conversations (jsonl) instead of the usual mixture; --model_name adds its own", decides="rows"
    )
    metrics_every: int = flag(
        200,
        "steps between chat accuracies; 0: only at the end",
        free=True,
        reference={"eval_metrics_every": "it is --metrics_every here"},
    )
    metrics_max_problems: int = flag(
        1024,
        "problems per chat accuracy",
        free=True,
        reference={"eval_metrics_max_problems": "it is --metrics_max_problems here"},
    )


DEFAULTS = SftSettings(  # the reference's, whose 32 conversations a step are about 16,384 tokens
    total_batch_size=16384,
    init_lr_frac=0.02,
    grad_clip=0.0,
    eval_every=100,
    eval_tokens=100 * 32 * 512,
    sample_every=0,
    save_every=200,
)
DEMO = dataclasses.replace(
    DEFAULTS,
    demo=True,
    total_batch_size=4096,
    num_iterations=430,
    # off: the lesson that finetuning begins with (tasks/demo_world.py) comes suddenly, with 50 times the usual gradient
    spike=0.0,
    init_lr_frac=0.8,
    eval_every=150,
    eval_tokens=32768,
    metrics_every=0,
    metrics_max_problems=200,
    save_every=50,
)


def defaults(demo: bool, recorded: Mapping[str, Any]) -> SftSettings:
    """Those of the modern recipe, which goes from base straight to finetuning; what pretraining was done with (given by
    the flags of the parent) goes on: batch and, as they were before they were scaled, learning rates."""
    names = ("total_batch_size", "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
    kept = {name: recorded[name] for name in names if name in recorded}
    own = dict(init_lr_frac=0.8, weight_decay=0.0, eval_every=200, eval_tokens=40 * TOTAL_BATCH_SIZE)
    settings = of_recipe(DEMO if demo else DEFAULTS, "modern")
    if demo:
        return dataclasses.replace(settings, **{**kept, "init_lr_frac": 0.8, "weight_decay": 0.0})
    return dataclasses.replace(settings, **{"total_batch_size": TOTAL_BATCH_SIZE, **kept, **own})


def run(settings: SftSettings) -> Outcome:
    """Finetunes one model, or resumes its run."""
    mesh = open_devices(settings)
    modern = settings.recipe == "modern"
    parent = open_parent(settings, "sft", tuple(reversed(PARENTS)) if modern else PARENTS)
    with checkpoint.exclusive(child_run(settings, parent, "sft")) as folder:
        rows = make_rows(settings, parent, mesh, mixtures.sft(settings, parent, settings.data), "best_fit")
        if modern:
            hyper = settings.hyper(momentum=0.95, momentum_warmup=300, momentum_final=None)
            job = make_job("sft", settings, folder, parent, mesh, rows, hyper, partial(late_decay, fraction=0.5))
            job = dataclasses.replace(job, inherit_moments=parent.stage == "base")
        else:
            hyper = settings.hyper(momentum_warmup=0)  # v1 ramps Muon's momentum in base and mid only
            job = make_job("sft", settings, folder, parent, mesh, rows, hyper, linear_to_zero, ROWS)
        measure = _accuracies(settings, parent, multihost.local_mesh(mesh))
        evaluations = (Evaluation(measure, settings.metrics_every, at_start=False),) if measure else ()
        return train_on(job, rows, evaluations, shuffle=settings.data is not None)


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
