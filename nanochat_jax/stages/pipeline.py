"""What all stages share: their flags, the run's folder, the parent's model, going on with a run, the job for `fit`."""

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from nanochat_jax.data.loader import RowLoader, val_batches
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.evals.bpb import held_out_loss
from nanochat_jax.hardware import devices
from nanochat_jax.model.gpt import GPTConfig, Params, flops_per_token
from nanochat_jax.parallel import cluster, multihost, sharding
from nanochat_jax.planner.fit_batch import AUTO
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.training.loop import Batch, Evaluation, Job, Outcome, Rollout, fit
from nanochat_jax.training.optim import OptimHyper, make_optimizer
from nanochat_jax.training.schedules import Schedule
from nanochat_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
    restore_padding,
    state_of,
    strip_padding,
)
from nanochat_jax.utils import paths, provenance
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.flags import flag

MODEL_NAME = "nanochat"  # what a model is called that nobody gave a name


def batch_flag(rows: int) -> Any:
    """--device_batch_size of a stage whose usual number of rows is given."""
    return flag(
        AUTO,
        f"rows per device and micro-step, the mathematics stays; auto: on GPUs as many as fit, elsewhere {rows}",
        words={"auto": AUTO},
    )


@dataclass(frozen=True)
class StageSettings:
    """Flags that every stage has. Names and defaults are the reference's where it has them."""

    ROWS: ClassVar[int] = 32  # rows per device where nothing says how many fit: the reference's

    run_name: str = flag("", "name of the run's folder")
    device_batch_size: int = batch_flag(ROWS)
    total_batch_size: int = flag(524288, "tokens per optimizer step, reached by accumulation")
    num_iterations: int = flag(-1, "optimizer steps")
    embedding_lr: float = flag(0.2, "AdamW learning rate of the embedding at width 768")
    unembedding_lr: float = flag(0.004, "AdamW learning rate of the unembedding at width 768")
    matrix_lr: float = flag(0.02, "Muon learning rate of the matrices")
    weight_decay: float = flag(0.0, "decoupled weight decay of the embeddings")
    grad_clip: float = flag(1.0, "largest global gradient norm; 0: no clipping")
    eval_every: int = flag(250, "steps between evaluations; 0: only at the end")
    eval_tokens: int = flag(20 * 524288, "tokens of held-out text per evaluation")
    sample_every: int = flag(2000, "steps between samples; 0: only at the end")
    save_every: int = flag(1000, "steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)")
    keep: int = flag(2, "newest checkpoints kept; 0: all")
    keep_every: int = flag(0, "checkpoints of every so many steps are kept for good; 0: none")
    async_save: bool = flag(True, "write checkpoints in the background while training goes on")
    spike: float = flag(
        10.0, "skip a step whose gradient norm is this many times the usual, or whose loss is that far off; 0: never"
    )
    max_skips: int = flag(5, "end the run after so many skipped steps in a row")
    hang_timeout: float = flag(
        600.0, "seconds without a finished step (or 20 median steps, if longer) after which the run ends; 0: never"
    )
    resume: bool = flag(True, "go on with an existing run; False sets the old folder aside and starts anew")
    seed: int = flag(42, "seed of initialisation, data order and sampling")
    remat: str = flag("none", "activations recomputed in the backward pass", choices=("none", "mlp", "block"))
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "gpu"))
    distributed: str = flag("auto", "where the processes of a job are described", choices=cluster.MODES)
    fsdp: int = flag(1, "devices over which parameters are cut, too")
    tensor: int = flag(1, "devices over which heads, hidden units and vocabulary are cut")
    sinks: str = flag("", "further metric sinks, comma-separated: wandb, tensorboard (metrics.jsonl is always written)")
    demo: bool = flag(False, "the embedded demo world, with small defaults (they change with this flag)")


# Settings that may differ between the parts of one run: they change neither the mathematics nor the data order.
# What derives from them (num_iterations) or is identified by its content (the rows) is compared instead.
FREE = {
    "run_name", "device_batch_size", "eval_every", "eval_tokens", "sample_every", "save_every", "keep", "resume",
    "remat", "device", "sinks", "num_iterations", "source", "source_step", "keep_every", "async_save", "max_skips",
    "hang_timeout", "distributed", "fsdp", "tensor",
}  # fmt: skip


def open_devices(settings: StageSettings) -> Mesh:
    """Readies JAX, brings the processes of the job together and returns the mesh over all their devices."""
    devices.prepare(settings.device, alone=True)
    cluster.start(settings.distributed)
    print(f"device: {devices.check(settings.device)}")
    return sharding.make_mesh(fsdp=settings.fsdp, tensor=settings.tensor)


@dataclass(frozen=True)
class Parent:
    """The model a stage starts from: `params` reads its parameters; model_name is what it calls itself."""

    run: str
    step: int
    stage: str
    config: GPTConfig
    tokenizer: Tokenizer
    params: Callable[[], Params]
    model_name: str = MODEL_NAME

    @property
    def meta(self) -> dict:
        return {"run": self.run, "step": self.step, "stage": self.stage}


def find_parent(source: str, stages: tuple[str, ...], step: int | None = None) -> Parent:
    """The run named `source`, or the newest one of the first of `stages` that has any, at its end (or at `step`).

    Raises CheckpointError when there is none, ValueError when the named run is of another stage or was stopped early.
    """
    folder = checkpoint.find_run(source) if source else checkpoint.find_first(stages)
    meta = checkpoint.load_meta(folder, step)
    if meta["stage"] not in stages:
        raise InputError(
            f"--source={folder.name} is a {meta['stage']} run; this stage starts from one of: {', '.join(stages)}"
        )
    planned = meta["identity"].get("num_iterations", meta["step"])
    if step is None and meta["step"] < planned:
        raise InputError(
            f"the run {folder.name} was stopped at step {meta['step']} of {planned}: finish it with the command that "
            f"started it, or take it as it is with --source_step={meta['step']}"
        )
    config = checkpoint.config_from_dict(meta["config"])
    return Parent(
        folder.name,
        meta["step"],
        meta["stage"],
        config,
        checkpoint.load_tokenizer(folder, meta),
        lambda: checkpoint.load_params(folder, meta),
        meta.get("settings", {}).get("model_name") or MODEL_NAME,
    )


def child_name(parent: str, stage: str) -> str:
    """The default name of a run that starts from `parent`: "d20" -> "d20-mid" -> "d20-sft"."""
    name, _, last = parent.rpartition("-")
    return f"{name if name and last in ('base', 'mid', 'sft', 'rl') else parent}-{stage}"


@dataclass
class Recipe:
    """What a stage brings: how long, from what start, on which batches, measured how. `train` does the rest.

    identity: what decides the numbers beside the settings (rows, parent, ...): a run is only gone on with if it agrees.
    """

    stage: str
    settings: StageSettings
    tokenizer: Tokenizer
    config: GPTConfig
    num_iterations: int
    schedule: Schedule
    tokens_per_step: int
    identity: dict[str, Any]
    batches: Callable[[int], Iterator[Batch]] | None = None
    rollout: Callable[[Any, int], Rollout] | None = None
    evaluations: tuple[Evaluation, ...] = ()
    sample: Callable[[Any], list[str]] | None = None
    parent: Parent | None = None  # None: fresh parameters
    normalize: bool = True
    hyper: dict[str, Any] = dataclasses.field(default_factory=dict)  # OptimHyper fields that are no flags


def train(recipe: Recipe, folder: Path, mesh) -> Outcome:
    """Runs a recipe in the run's folder, from its newest checkpoint or from the start."""
    settings, config = recipe.settings, recipe.config
    optimizer = optimizer_of(settings, config, recipe.schedule, recipe.hyper)
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
    if recipe.parent and "model_name" in flags:  # recorded for the stages to come and for evaluation
        given = recipe.stage != "rl" and flags["model_name"]  # it has no conversations to learn a name from
        flags["model_name"] = given or recipe.parent.model_name
    identity = {
        **{k: v for k, v in flags.items() if k not in FREE},
        "num_iterations": recipe.num_iterations,
        **recipe.identity,
    }
    identity = {k: v for k, v in identity.items() if v is not None}
    state, evaluated = _start_or_resume(folder, recipe, identity, optimizer, mesh)
    peak = 0.0
    if multihost.is_main():
        peak, peak_source = devices.peak_flops()
        print(f"peak for MFU: {peak / 1e12:.3g} TFLOP/s per device ({peak_source})")
    unpadded = abstract_state(config, optimizer, mesh, padded=False)
    code = provenance.source()
    job = Job(
        run=folder,
        num_iterations=recipe.num_iterations,
        train_step=make_train_step(config, optimizer, mesh, settings.grad_clip, recipe.normalize, guarded=True),
        batches=recipe.batches,
        rollout=recipe.rollout,
        meta={
            "stage": recipe.stage,
            "config": checkpoint.config_to_dict(config),
            "tokenizer_hash": recipe.tokenizer.hash,
            "identity": identity,
            "settings": flags,
            "normalize": recipe.normalize,
            "code": {"commit": code.commit, "dirty": code.dirty, "sha256": code.sha256},
            **({"parent": recipe.parent.meta} if recipe.parent else {}),
        },
        tokens_per_step=recipe.tokens_per_step,
        flops_per_token=flops_per_token(config),
        peak_flops=peak * mesh.size,
        evaluations=recipe.evaluations,
        sample=recipe.sample,
        sample_every=settings.sample_every,
        sample_at_start=recipe.parent is not None,
        save_every=settings.save_every,
        keep=settings.keep,
        keep_every=settings.keep_every,
        save_in_background=settings.async_save,
        spike=settings.spike,
        max_skips=settings.max_skips,
        hang_timeout=settings.hang_timeout,
        sinks=metrics.open_sinks(settings.sinks, folder.name, folder, flags) if multihost.is_main() else {},
        schedule=lambda step: {"lr_multiplier": recipe.schedule(step)},
        to_saved=lambda s: strip_padding(s, unpadded),
        place=lambda batch: multihost.place_batch(mesh, batch, whole=recipe.rollout is not None),
        local=lambda params: multihost.local(params, mesh),
    )
    outcome = fit(job, state, evaluated)
    if outcome.finished:
        results = ", ".join(f"{_NAMES.get(k, k)} {v:.4f}" for k, v in outcome.results.items())
        print(f"run {folder.name} is complete: {results}")
    return outcome


def optimizer_of(settings: StageSettings, config: GPTConfig, schedule: Schedule, hyper: dict[str, Any]):
    """The optimizer that the flags describe; hyper: OptimHyper fields that are no flags."""
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(OptimHyper) if hasattr(settings, f.name)}
    return make_optimizer(OptimHyper(**{**given, **hyper}), schedule, config.n_embd)


_NAMES = {"val_bpb": "held-out bits per byte", "val_loss": "held-out loss"}


def open_run(folder: Path, settings: StageSettings, tokenizer: Tokenizer) -> None:
    """Makes the folder with its own copy of the tokenizer; an old run is set aside if it is not to be resumed."""
    multihost.barrier("before the run's folder")
    if multihost.is_main():
        if folder.exists() and not settings.resume:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
                number += 1
            os.rename(folder, aside)
            print(f"the earlier run is kept as {aside}")
        folder.mkdir(parents=True, exist_ok=True)
        if not checkpoint.steps(folder):
            tokenizer.save(folder)
    multihost.barrier("the run's folder")
    if not folder.is_dir():
        raise cluster.DistributedError(
            f"process 0 made {folder}, but it is not seen on {socket.gethostname()}: {paths.BASE_DIR_VARIABLE} must be "
            "a folder that all hosts share"
        )


def _start_or_resume(folder: Path, recipe: Recipe, identity, optimizer, mesh) -> tuple[TrainState, bool]:
    """(state, whether its step was already evaluated): the newest checkpoint's, or a fresh one."""
    config = recipe.config
    if not checkpoint.steps(folder):
        if recipe.parent is not None:
            return state_of(config, multihost.to_host(recipe.parent.params()), optimizer, mesh), False
        key = jax.random.key(recipe.settings.seed, impl="threefry2x32")  # whatever JAX's default is one day
        return init_state(config, optimizer, mesh, key), False
    meta = checkpoint.load_meta(folder)
    now, then = recipe.tokenizer.hash, meta["tokenizer_hash"]
    if now != then:
        raise checkpoint.CheckpointError(
            f"{folder} was trained with tokenizer {then[:12]}, but the current one is {now[:12]}. Train a new run with "
            f"--run_name=NAME, or put the old tokenizer back: it is kept as {folder / 'tokenizer.json'}"
        )
    if meta["stage"] != recipe.stage:
        raise checkpoint.CheckpointError(
            f"{folder} holds a {meta['stage']} run; choose another --run_name for this {recipe.stage} run"
        )
    then_unknown = {k for k in identity if k not in meta["identity"] and k not in meta["settings"]}  # newer flags
    changed = [
        k
        for k in {**identity, **meta["identity"]}
        if identity.get(k) != meta["identity"].get(k) and k not in then_unknown
    ]
    if changed:
        details = ", ".join(f"{k}: {meta['identity'].get(k)} -> {identity.get(k)}" for k in changed)
        raise checkpoint.CheckpointError(
            f"the run in {folder} was started with other settings ({details}). Use the old settings to go on, another "
            "--run_name for a new run beside it, or --resume=False to set the old one aside."
        )
    saved = checkpoint.restore(folder, meta["step"], abstract_state(config, optimizer, mesh, padded=False))
    print(f"going on with {folder} from step {meta['step']}")
    return restore_padding(saved, abstract_state(config, optimizer, mesh)), meta["evaluated"]


def micro_batches(loader: RowLoader, step: int, accumulation: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches from `step` on, cut into (accumulation, rows, T); with several processes, the rows of this one."""
    part = None
    if multihost.several():
        rows = loader.global_batch // accumulation
        own = multihost.own_rows(mesh, rows)
        part = [micro * rows + row for micro in range(accumulation) for row in own]
    iterator = loader.iterate(step, part)
    try:
        for batch in iterator:
            inputs, targets, weights = (a.reshape(accumulation, -1, a.shape[-1]) for a in batch)
            yield inputs, targets, weights
    finally:
        iterator.close()


def held_out(config, rows: RowSet, batch_rows: int, tokenizer: Tokenizer, mesh):
    """An evaluation: {"val_loss": mean nats per supervised target, "val_bpb": bits per byte} on all held-out rows,
    `batch_rows` at a time on a device (which changes nothing but the memory needed).
    Each of several processes measures all of them on its own devices."""
    mesh = multihost.local_mesh(mesh)
    batch = min(batch_rows * mesh.size, -(-len(rows) // mesh.size) * mesh.size)
    token_bytes = tokenizer.token_bytes()

    def measure(params) -> dict[str, float]:
        return held_out_loss(config, params, val_batches(rows, batch), token_bytes, mesh)

    return measure
