"""How many rows a stage works on at a time: on GPUs as many as fit, by what its compiled programs need."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from nanochat_jax.hardware.devices import OutOfMemory
from nanochat_jax.model.gpt import num_params
from nanochat_jax.parallel import multihost, sharding
from nanochat_jax.planner import fit_batch, memory
from nanochat_jax.training.execution import announce
from nanochat_jax.training.job import AUTO, Outcome, TrainJob


def with_batch_size(job: TrainJob, attempt: Callable[[TrainJob], Outcome]) -> Outcome:
    """Calls `attempt` with the job, its --device_batch_size=auto made a number: on GPUs the largest that fits, the
    stage's usual number elsewhere, or the next below that divides the batch.

    When memory runs out all the same, it is called again with half of it, to resume from where the run was saved.

    On GPUs the evaluation and the sampling are compiled first: DoesNotFit is raised at the start and not after hours.
    """
    settings = job.settings
    announce(job.config, job.mesh, settings.require_fast, settings.fp8, settings.fused_norms)
    # 1. the number of rows
    limit = fit_batch.least_free_memory()
    rows = job.settings.device_batch_size
    if rows == AUTO:
        rows_per_device = job.rows_per_step // sharding.row_shards(job.mesh)
        rows = usual_rows(job.usual_rows, rows_per_device) if limit is None else _choose_rows(job, limit)
    # 2. whatever else will run must fit as well
    if limit is not None:
        _check_other_programs(job, rows, limit)
    # 3. train, with half of them whenever memory runs out
    resume = {}
    while True:
        settings = dataclasses.replace(job.settings, device_batch_size=rows, **resume)
        try:
            return attempt(dataclasses.replace(job, settings=settings))
        except OutOfMemory as error:
            if multihost.several():  # the others know nothing of it
                raise OutOfMemory(f"{error}. Start again with a smaller --device_batch_size") from None
            rows = fit_batch.halved(rows)
            print(f"{error}. Resuming with --device_batch_size={rows}", flush=True)
        resume = {"resume": True}


def usual_rows(most: int, total: int) -> int:
    """The largest power of two up to `most`, itself one, that divides the `total` rows of a device and step."""
    rows = most
    while rows > 1 and total % rows:
        rows //= 2
    return rows


def _shares(job: TrainJob) -> memory.Mesh:
    mesh = job.mesh
    return memory.Mesh(mesh.size, mesh.shape[sharding.FSDP], mesh.shape[sharding.TENSOR])


def _choose_rows(job: TrainJob, limit: int) -> int:
    """The largest number of rows whose compiled step fits `limit` bytes per device."""
    config, T, total = job.config, job.sequence_len, job.rows_per_step // sharding.row_shards(job.mesh)

    def measure(rows: int) -> int | None:
        step = job.train_step, config, job.optimizer, job.mesh
        return fit_batch.measured(lambda: fit_batch.lower_step(*step, rows, total // rows, T))

    def guess(rows: int) -> float:
        return memory.estimate(dataclasses.replace(config, sequence_len=T), rows, _shares(job), config.remat)

    choice = fit_batch.choose(total, measure, limit, guess)
    print(choice.describe(total), flush=True)
    return choice.rows


def _check_other_programs(job: TrainJob, rows: int, limit: int) -> None:
    """Raises DoesNotFit where sampling or the held-out loss do not fit beside the training state."""
    config, device = job.config, jax.local_devices()[0]
    state = memory.state_bytes(config, _shares(job))
    sampling = lambda: fit_batch.lower_sampling(config, device, *job.sampled)  # noqa: E731
    programs: list[tuple[str, Callable[[], Any], int]] = [("sampling", sampling, state)]
    if job.held_out:
        local, parameters = multihost.local_mesh(job.mesh), 4 * num_params(config)
        beside = max(0, state - parameters)  # it reads the parameters of the state
        lower = fit_batch.lower_evaluation
        programs.append(("the evaluation", lambda: lower(config, local, rows, job.sequence_len), beside))
    fit_batch.check_all(programs, limit)
