"""What a stage gives the training loop: `TrainJob`, and the flags that training reads whatever the stage."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh

from nanochat_jax.model.config import RECIPES
from nanochat_jax.model.gpt import GPTConfig, Params
from nanochat_jax.parallel import sharding
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.training.execution import norms_refused
from nanochat_jax.training.optim import GRAD_CLIP, MODERN, OptimHyper, make_optimizer
from nanochat_jax.training.schedules import Schedule
from nanochat_jax.training.step import TrainState, abstract_state, make_train_step
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.flags import flag

AUTO = 0  # --device_batch_size=auto
MODEL_NAME = "nanochat"  # what a model is called that nobody gave a name

SettingsT = TypeVar("SettingsT", bound="TrainSettings")
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets, weights: (A, B, T)


@dataclass(frozen=True)
class TrainSettings:
    """Training: optimizer, cadence, checkpoints, protection."""

    device_batch_size: int = flag(
        AUTO,
        "rows per device and micro-step, which does not change the mathematics; auto: on GPUs as many as fit, "
        "elsewhere 32 (sft 1, rl 8; with --demo 16)",
        words={"auto": AUTO},
        free=True,
    )
    require_fast: bool = flag(
        False, "on a GPU, refuse to train by anything but the fast way, which is otherwise only said", free=True
    )
    fp8: bool = flag(
        False,
        "compute the products of the layers in float8 (Ada, Hopper, Blackwell): quicker from about depth 20 on, "
        "less precise",
    )
    fused_norms: bool = flag(True, "on NVIDIA GPUs, norms and rotary embedding in kernels of our own", free=True)
    recipe: str = flag("v1", "nanochat of October 2025 (v1) or of July 2026 (modern)", choices=RECIPES)
    embedding_lr: float = flag(OptimHyper.embedding_lr, "AdamW learning rate of the embedding at width 768")
    unembedding_lr: float = flag(OptimHyper.unembedding_lr, "AdamW learning rate of the unembedding at width 768")
    matrix_lr: float = flag(OptimHyper.matrix_lr, "Muon learning rate of the matrices")
    scalar_lr: float = flag(
        OptimHyper.scalar_lr, "AdamW learning rate of the scalars on residual stream and x0 (modern recipe)"
    )
    weight_decay: float = flag(
        OptimHyper.weight_decay, "decoupled weight decay: of the embeddings in v1, of the matrices in the modern recipe"
    )
    grad_clip: float = flag(
        GRAD_CLIP["v1"], "largest global gradient norm; 0: no clipping (the reference clips in base only)"
    )
    eval_every: int = flag(
        250,
        "steps between evaluations; 0: only at the end",
        free=True,
        reference={
            "core_metric_every": "scripts.eval evaluates CORE after training (--tasks=CORE)",
            "core_metric_max_per_task": "scripts.eval evaluates CORE after training (--max_per_task)",
        },
    )
    sample_every: int = flag(2000, "steps between samples; 0: only at the end", free=True)
    save_every: int = flag(1000, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)", free=True)
    keep: int = flag(2, "newest checkpoints kept; 0: all", free=True)
    keep_every: int = flag(0, "checkpoints of every so many steps are kept for good; 0: none", free=True)
    async_save: bool = flag(True, "write checkpoints in the background while training continues", free=True)
    spike: float = flag(
        10.0, "skip a step whose gradient norm is this many times the usual, or whose loss is that far off; 0: never"
    )
    max_skips: int = flag(5, "end the run after so many skipped steps in a row", free=True)
    hang_timeout: float = flag(
        600.0,
        "seconds without a finished step (or 20 median steps, if longer) after which the run ends; 0: never",
        free=True,
    )
    profile_steps: str = flag(
        "",
        "trace these steps for XProf into the run's folder, profile/: first:end, as in 10:13 for 10 to 12",
        free=True,
    )
    resume: bool = flag(True, "resume an existing run; False sets the old folder aside and starts anew", free=True)
    seed: int = flag(42, "seed of initialisation, data order and sampling")
    sinks: str = flag(
        "",
        "further metric sinks, comma-separated: wandb, tensorboard (metrics.jsonl is always written)",
        free=True,
        reference={"dry_run": "it is not needed here: nothing is logged elsewhere unless --sinks asks for it"},
    )

    def hyper(self, **fixed: Any) -> OptimHyper:
        """The optimizer's hyperparameters: the flags of the same names, and `fixed` ones that are no flags.

        Raises InputError, naming the flag, for a value that cannot be.
        """
        names = {f.name for f in dataclasses.fields(OptimHyper)} & {f.name for f in dataclasses.fields(self)}
        try:
            return OptimHyper.of(**{name: getattr(self, name) for name in names}, **fixed)
        except InputError as error:
            raise InputError(f"--{error}") from None


def of_recipe(defaults: SettingsT, recipe: str) -> SettingsT:
    """A stage's defaults (which are v1's) with those of a recipe: the optimizer's flags, and no clipping in modern."""
    hyper = OptimHyper.of(recipe)
    names = set(MODERN) & {f.name for f in dataclasses.fields(defaults)}
    clip = GRAD_CLIP[recipe] if defaults.grad_clip else 0.0  # some stages do not clip in v1 either
    return dataclasses.replace(defaults, grad_clip=clip, **{name: getattr(hyper, name) for name in names})


@dataclass(frozen=True)
class Evaluation:
    """Numbers measured on the model now and then: `measure(params)` gives for example {"val_bpb": 1.2}."""

    measure: Callable[[Params], dict[str, float]]
    every: int = 0  # 0 or negative: only at the end (the reference treats -1 as every step)
    at_start: bool = True  # also before the first update, where it is due every so many steps


@dataclass(frozen=True)
class Rollout:
    """A batch that the model made itself, the numbers to log with its step, and texts to keep."""

    batch: Batch
    numbers: dict[str, float] = field(default_factory=dict)
    transcripts: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Parent:
    """The model a stage starts from: `params` reads its parameters; model_name is what it calls itself; recipe: the one
    that it was trained by."""

    run: str
    step: int
    stage: str
    config: GPTConfig
    tokenizer: Tokenizer
    params: Callable[[], Params]
    model_name: str = MODEL_NAME
    recipe: str = "v1"

    @property
    def meta(self) -> dict[str, Any]:
        return {"run": self.run, "step": self.step, "stage": self.stage}


@dataclass(frozen=True)
class TrainJob:
    """One run of training, from the first step to the last: which model, how long, on which batches, measured how.

    A stage builds it in two moves: first what is known before the batch size is chosen, then, with
    `dataclasses.replace`, the data. Either `batches` gives the batches (from a step on; a pure function of the step) or
    `rollout` makes them (a pure function of the parameters and the step). With several processes, `batches` gives each
    its own rows, `rollout` all rows.
    """

    stage: str
    settings: TrainSettings  # with a device_batch_size that is a number when training begins
    run: Path  # the run's folder
    tokenizer: Tokenizer
    config: GPTConfig
    mesh: Mesh
    hyper: OptimHyper
    schedule: Schedule  # step -> multiplier of all learning rates
    num_iterations: int
    rows_per_step: int  # over all devices and micro-steps
    sequence_len: int  # T, tokens per row
    sampled: tuple[int, int]  # the largest sampling on one device: completions side by side, tokens of each
    held_out: bool = True  # a loss on held-out rows is measured
    usual_rows: int = 32  # rows per device and micro-step where a device does not say how much memory it has
    normalize: bool = True  # the loss is divided by the sum of the weights
    parent: Parent | None = None  # None: fresh parameters
    inherit_moments: bool = False  # the optimizer goes on with the parent's moments, where these are stored
    model_name: str = ""  # what the model calls itself; recorded if any
    identity: dict[str, Any] = field(default_factory=dict)  # what must agree on resume, beside the settings
    batches: Callable[[int], Iterator[Batch]] | None = None
    rollout: Callable[[Params, int], Rollout] | None = None
    evaluations: tuple[Evaluation, ...] = ()
    sample: Callable[[Params], list[str]] | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.sequence_len

    @property
    def accumulation(self) -> int:
        """Micro-steps per optimizer step."""
        return self.rows_per_step // (self.settings.device_batch_size * sharding.row_shards(self.mesh))

    @functools.cached_property
    def optimizer(self) -> Any:
        return make_optimizer(self.hyper, self.schedule, self.config.n_embd, self.num_iterations)

    @functools.cached_property
    def train_step(self) -> Any:
        """The jitted, guarded step (see `step.make_train_step`)."""
        clip = self.settings.grad_clip
        # nothing but training has fused norms, or is in float8
        refused = norms_refused(self.config, self.mesh.devices.flat[0], self.settings.fused_norms)
        config = dataclasses.replace(self.config, fused=not refused)
        if self.settings.fp8:
            config = dataclasses.replace(config, compute_dtype="float8")
        return make_train_step(config, self.optimizer, self.mesh, clip, self.normalize, guarded=True)

    def abstract_state(self, padded: bool) -> TrainState:
        """Shapes and shardings of the state: as training holds it (padded) or as a checkpoint stores it."""
        return abstract_state(self.config, self.optimizer, self.mesh, padded)


@dataclass(frozen=True)
class Outcome:
    """How a run of the loop ended."""

    state: TrainState
    finished: bool  # False: stopped by a signal, with a checkpoint to resume from
    results: dict[str, float]  # the last evaluation
