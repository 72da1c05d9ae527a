"""Midtraining: the base model meets conversations, as one stream of which every token is trained on."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from nanochat_jax.runs import checkpoint
from nanochat_jax.stages import mixtures
from nanochat_jax.stages.pipeline import child_run, open_devices, open_parent
from nanochat_jax.stages.settings import ChatStageSettings
from nanochat_jax.stages.supervised import make_job, make_rows, train_on
from nanochat_jax.training.job import Outcome
from nanochat_jax.training.schedules import late_decay
from nanochat_jax.utils.errors import InputError

PARENTS = ("base",)

DEFAULTS = ChatStageSettings(grad_clip=0.0, eval_every=150, sample_every=0, save_every=200)  # the reference's
DEMO = dataclasses.replace(
    DEFAULTS, demo=True, num_iterations=140, total_batch_size=4096, eval_every=70, eval_tokens=32768, save_every=50
)


def defaults(demo: bool, recorded: Mapping[str, Any]) -> ChatStageSettings:
    """The modern recipe goes from base straight to finetuning. Raises InputError."""
    raise InputError("the modern recipe has no midtraining: go on with --stage=sft from the base run")


def run(settings: ChatStageSettings) -> Outcome:
    """Midtrains one model, or resumes its run."""
    mesh = open_devices(settings)
    parent = open_parent(settings, "mid", PARENTS)
    with checkpoint.exclusive(child_run(settings, parent, "mid")) as folder:
        rows = make_rows(settings, parent, mesh, mixtures.mid(settings, parent), "stream")
        schedule = partial(late_decay, fraction=0.2)
        job = make_job("mid", settings, folder, parent, mesh, rows, settings.hyper(), schedule)
        return train_on(job, rows)
