"""What all stages do: open the devices, find the parent, open the run's folder, resume or begin, train."""

import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax.data.loader import RowLoader, val_batches
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.evals.bpb import held_out_loss
from nanochat_jax.hardware import devices
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.parallel import cluster, multihost, sharding
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages.settings import ChatStageSettings, StageSettings, compared
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.training.job import MODEL_NAME, Batch, Outcome, Parent, TrainJob
from nanochat_jax.training.loop import fit
from nanochat_jax.training.step import TrainState, init_state, restore_padding, state_of
from nanochat_jax.utils import paths, provenance
from nanochat_jax.utils.errors import InputError


def open_devices(settings: StageSettings, decodes: bool = False) -> Mesh:
    """Readies JAX, brings the processes of the job together and returns the mesh over all their devices.
    decodes: the stage spends much of its time sampling."""
    job = cluster.find_cluster(settings.distributed)
    devices.prepare(settings.device, alone=True, decodes=decodes, processes=job.processes if job else 1)
    cluster.start(settings.distributed)
    print(f"device: {devices.check(settings.device)}")
    return sharding.make_mesh(fsdp=settings.fsdp, tensor=settings.tensor)


# ---------------------------------------------------------------------------------------------------------------------
# the parent


def open_parent(settings: ChatStageSettings, stage: str, parents: tuple[str, ...]) -> Parent:
    """The parent that --source names, or the one an existing run had, or the newest of the stage before."""
    source, step = settings.source, settings.source_step
    if not source and settings.run_name and settings.resume:
        folder = checkpoint.run_dir(settings.run_name)
        if checkpoint.steps(folder):
            recorded = checkpoint.load_meta(folder).get("parent", {})
            source, step = recorded.get("run", ""), recorded.get("step")
    parent = find_parent(source, parents, step)
    if parent.recipe != settings.recipe:
        raise InputError(
            f"--recipe={settings.recipe} does not fit {parent.run}, which was trained by the recipe {parent.recipe}: "
            "leave the flag out, or give another --source"
        )
    print(f"{stage} starts from {parent.run}, step {parent.step} ({parent.stage})")
    return parent


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
    return Parent(
        run=folder.name,
        step=meta["step"],
        stage=meta["stage"],
        config=checkpoint.config_from_dict(meta["config"]),
        tokenizer=checkpoint.load_tokenizer(folder, meta),
        params=lambda: checkpoint.load_params(folder, meta),
        model_name=meta.get("settings", {}).get("model_name") or MODEL_NAME,
        recipe=meta.get("settings", {}).get("recipe") or "v1",
    )


def child_run(settings: ChatStageSettings, parent: Parent, stage: str) -> Path:
    """The folder of a run that starts from `parent`, by default "d20" -> "d20-mid" -> "d20-sft"."""
    name, _, last = parent.run.rpartition("-")
    stem = name if name and last in ("base", "mid", "sft", "rl") else parent.run
    return checkpoint.run_dir(settings.run_name or f"{stem}-{stage}")


# ---------------------------------------------------------------------------------------------------------------------
# the run


def train(job: TrainJob) -> Outcome:
    """Runs a job in its folder, from the newest checkpoint or from the start."""
    # 1. what is recorded with every checkpoint
    recorded = recorded_settings(job)
    identity = identity_of(job, recorded)
    code = provenance.source()
    meta = {
        "stage": job.stage,
        "config": checkpoint.config_to_dict(job.config),
        "tokenizer_hash": job.tokenizer.hash,
        "identity": identity,
        "settings": recorded,
        "normalize": job.normalize,
        "code": {"commit": code.commit, "dirty": code.dirty, "sha256": code.sha256},
        **({"parent": job.parent.meta} if job.parent else {}),
    }
    # 2. the state: of the newest checkpoint, of the parent, or fresh
    state, evaluated = _resume(job, identity) if checkpoint.steps(job.run) else (_begin(job), False)
    # 3. train
    outcome = fit(job, state, meta, evaluated)
    if outcome.finished:
        results = ", ".join(f"{_NAMES.get(k, k)} {v:.4f}" for k, v in outcome.results.items())
        print(f"run {job.run.name} is complete: {results}")
    return outcome


_NAMES = {"val_bpb": "held-out bits per byte", "val_loss": "held-out loss"}


def recorded_settings(job: TrainJob) -> dict[str, Any]:
    """The flags as a run records them: JSON-able, and with the name that the model has, given or inherited."""
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(job.settings).items()}
    return {**flags, "model_name": job.model_name} if job.model_name else flags


def identity_of(job: TrainJob, recorded: dict[str, Any]) -> dict[str, Any]:
    """What decides a run's numbers: flags, number of steps, rows, parent. A run is only resumed if it agrees."""
    flags = {k: recorded[k] for k in recorded if k in compared(job.settings, job.stage)}
    identity = {**flags, "num_iterations": job.num_iterations, **job.identity}
    return {k: v for k, v in identity.items() if v is not None}


def open_run(job: TrainJob) -> None:
    """Makes the run's folder with its own copy of the tokenizer; an old run is set aside if it is not to be resumed."""
    folder = job.run
    multihost.barrier("before the run's folder")
    if multihost.is_main():
        if folder.exists() and not job.settings.resume:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
                number += 1
            os.rename(folder, aside)
            print(f"the earlier run is kept as {aside}")
        folder.mkdir(parents=True, exist_ok=True)
        if not checkpoint.steps(folder):
            job.tokenizer.save(folder)
    multihost.barrier("the run's folder")
    if not folder.is_dir():
        raise cluster.DistributedError(
            f"process 0 made {folder}, but it is not seen on {socket.gethostname()}: {paths.BASE_DIR_VARIABLE} must be "
            "a folder that all hosts share"
        )


def _begin(job: TrainJob) -> TrainState:
    if job.parent is not None:
        state = state_of(job.config, multihost.to_host(job.parent.params()), job.optimizer, job.mesh)
        return _with_moments(job, job.parent, state) if job.inherit_moments else state
    key = jax.random.key(job.settings.seed, impl="threefry2x32")  # whatever JAX's default is one day
    return init_state(job.config, job.optimizer, job.mesh, key)


def _with_moments(job: TrainJob, parent: Parent, state: TrainState) -> TrainState:
    """The state with the moments of the parent's optimizer; schedules begin anew, Adam's bias correction does not."""
    folder = checkpoint.run_dir(parent.run)
    if checkpoint.load_meta(folder, parent.step).get("imported"):
        print(f"{parent.run} was imported without its optimizer's moments: they begin at zero")
        return state
    saved = checkpoint.restore(folder, parent.step, job.abstract_state(padded=False))
    moments = restore_padding(saved, job.abstract_state(padded=True)).opt_state
    muon = moments.muon._replace(count=state.opt_state.muon.count)
    return dataclasses.replace(state, opt_state=moments._replace(muon=muon))


def _resume(job: TrainJob, identity: dict[str, Any]) -> tuple[TrainState, bool]:
    """(state, whether its step was already evaluated) of the newest checkpoint. Raises CheckpointError for a run of
    another tokenizer, stage or identity."""
    folder = job.run
    meta = checkpoint.load_meta(folder)
    now, then = job.tokenizer.hash, meta["tokenizer_hash"]
    if now != then:
        raise checkpoint.CheckpointError(
            f"{folder} was trained with tokenizer {then[:12]}, but the current one is {now[:12]}. Train a new run with "
            f"--run_name=NAME, or put the old tokenizer back: it is kept as {folder / 'tokenizer.json'}"
        )
    if meta["stage"] != job.stage:
        raise checkpoint.CheckpointError(
            f"{folder} holds a {meta['stage']} run; choose another --run_name for this {job.stage} run"
        )
    newer = {k for k in identity if k not in meta["identity"] and k not in meta["settings"]}  # flags it did not have
    changed = [
        k for k in {**identity, **meta["identity"]} if identity.get(k) != meta["identity"].get(k) and k not in newer
    ]
    if changed:
        details = ", ".join(f"{k}: {meta['identity'].get(k)} -> {identity.get(k)}" for k in changed)
        raise checkpoint.CheckpointError(
            f"the run in {folder} was started with other settings ({details}). Use the old settings to resume it, "
            "another --run_name for a new run beside it, or --resume=False to set the old one aside."
        )
    saved = checkpoint.restore(folder, meta["step"], job.abstract_state(padded=False))
    print(f"resuming {folder} from step {meta['step']}")
    return restore_padding(saved, job.abstract_state(padded=True)), meta["evaluated"]


# ---------------------------------------------------------------------------------------------------------------------
# the data


def micro_batches(loader: RowLoader, step: int, accumulation: int, mesh: Mesh) -> Iterator[Batch]:
    """Batches from `step` on, as (accumulation, rows, T); with several processes, the rows of this one."""
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


def held_out(config: GPTConfig, rows: RowSet, batch_rows: int, tokenizer: Tokenizer, mesh: Mesh):
    """An evaluation: {"val_loss": mean nats per supervised target, "val_bpb": bits per byte} on all held-out rows,
    `batch_rows` at a time on a device (which changes nothing but the memory needed).
    Each of several processes measures all of them on its own devices."""
    mesh = multihost.local_mesh(mesh)
    batch = min(batch_rows * mesh.size, -(-len(rows) // mesh.size) * mesh.size)
    token_bytes = tokenizer.token_bytes()

    def measure(params) -> dict[str, float]:
        return held_out_loss(config, params, val_batches(rows, batch), token_bytes, mesh)

    return measure
