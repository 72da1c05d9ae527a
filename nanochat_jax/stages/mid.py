"""Midtraining: the base model meets conversations, as one stream in which every token is learnt."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from nanochat_jax.stages import mixtures
from nanochat_jax.stages.pipeline import Parent, batch_flag
from nanochat_jax.stages.supervised import ChatStageSettings, Lesson
from nanochat_jax.stages.supervised import run as run_supervised
from nanochat_jax.training.loop import Outcome
from nanochat_jax.training.schedules import late_decay
from nanochat_jax.utils.flags import flag

PARENTS = ("base",)


@dataclass(frozen=True)
class MidSettings(ChatStageSettings):
    """Flags of --stage=mid; defaults as the reference's."""

    grad_clip: float = flag(0.0, "largest global gradient norm; 0: no clipping (as the reference)")
    eval_every: int = flag(150, "steps between evaluations; 0: only at the end")
    sample_every: int = flag(0, "steps between samples; 0: only at the end")
    save_every: int = flag(200, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


@dataclass(frozen=True)
class DemoMidSettings(MidSettings):
    """The same flags with defaults for the demo world on two CPU cores."""

    ROWS: ClassVar[int] = 16

    demo: bool = flag(True, "conversations of the embedded demo world, with these small defaults")
    device_batch_size: int = batch_flag(ROWS)
    total_batch_size: int = flag(4096, "tokens per optimizer step, reached by accumulation")
    num_iterations: int = flag(140, "optimizer steps")
    eval_every: int = flag(70, "steps between evaluations; 0: only at the end")
    eval_tokens: int = flag(32768, "tokens of held-out conversations per evaluation")
    save_every: int = flag(50, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")


def run(settings: MidSettings) -> Outcome:
    """Midtrains, or goes on midtraining, one model."""

    def lesson(parent: Parent) -> Lesson:
        train, val = mixtures.mid(settings, parent)
        return Lesson("mid", PARENTS, "stream", train, val, partial(late_decay, fraction=0.2))

    return run_supervised(settings, "mid", PARENTS, lesson)
