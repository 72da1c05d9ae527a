"""How many rows a stage works on at a time: on GPUs as many as fit, by what its compiled programs need."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from nanochat_jax.model.gpt import GPTConfig, num_params
from nanochat_jax.parallel import multihost, sharding
from nanochat_jax.planner import fit_batch, memory
from nanochat_jax.planner.fit_batch import AUTO
from nanochat_jax.stages.pipeline import StageSettings, optimizer_of
from nanochat_jax.training.loop import Outcome
from nanochat_jax.training.schedules import Schedule
from nanochat_jax.training.step import make_train_step


@dataclass(frozen=True)
class Shapes:
    """What decides the memory of a stage beside its settings: rows per step over all devices, of T tokens; whether
    there is a held-out loss; how many answers of how many tokens are sampled on one device."""

    config: GPTConfig
    rows_per_step: int
    T: int
    sampled: tuple[int, int]
    evaluates: bool = True


def with_batch_size(
    settings: StageSettings,
    mesh: Mesh,
    shapes: Shapes,
    schedule: Schedule,
    attempt: Callable[[Any], Outcome],
    normalize: bool = True,
    hyper: dict[str, Any] | None = None,
) -> Outcome:
    """Calls `attempt` with the settings, their --device_batch_size=auto made a number: on GPUs the largest that fits,
    the stage's usual number elsewhere, or the next below that divides the batch.

    When memory runs out all the same, it is called again with half of it, to go on from where the run was saved.

    On GPUs the evaluation and the sampling are compiled first: DoesNotFit is raised at the start and not after hours.
    """
    limit = fit_batch.least_free_memory()
    rows = settings.device_batch_size
    if rows == AUTO:
        rows = usual_rows(settings.ROWS, shapes.rows_per_step // sharding.row_shards(mesh))
        if limit is not None:
            rows = _choose_rows(settings, mesh, shapes, schedule, normalize, hyper or {}, limit)
    if limit is not None:
        _check_other_programs(mesh, shapes, rows, limit)
    settings = dataclasses.replace(settings, device_batch_size=rows)
    while True:
        try:
            return attempt(settings)
        except fit_batch.OutOfMemory as error:
            if multihost.several():  # the others know nothing of it
                raise fit_batch.OutOfMemory(f"{error}. Start again with a smaller --device_batch_size") from None
            rows = fit_batch.halved(settings.device_batch_size)
            print(f"{error}. Going on with --device_batch_size={rows}", flush=True)
        settings = dataclasses.replace(settings, device_batch_size=rows, resume=True)


def usual_rows(most: int, total: int) -> int:
    """The largest power of two up to `most`, itself one, that divides the `total` rows of a device and step."""
    rows = most
    while rows > 1 and total % rows:
        rows //= 2
    return rows


def _choose_rows(settings, mesh, shapes: Shapes, schedule, normalize: bool, hyper: dict[str, Any], limit: int) -> int:
    config = shapes.config
    optimizer = optimizer_of(settings, config, schedule, hyper)
    step = make_train_step(config, optimizer, mesh, settings.grad_clip, normalize, guarded=True)
    total = shapes.rows_per_step // sharding.row_shards(mesh)
    cut = memory.Mesh(mesh.size, mesh.shape[sharding.FSDP], mesh.shape[sharding.TENSOR])

    def measure(rows: int) -> int | None:
        lower = fit_batch.lower_step
        return fit_batch.measured(lambda: lower(step, config, optimizer, mesh, rows, total // rows, shapes.T))

    def guess(rows: int) -> float:
        return memory.estimate(dataclasses.replace(config, sequence_len=shapes.T), rows, cut, config.remat)

    choice = fit_batch.choose(total, measure, limit, guess)
    print(choice.describe(total), flush=True)
    return choice.rows


def _check_other_programs(mesh: Mesh, shapes: Shapes, rows: int, limit: int) -> None:
    config, device = shapes.config, jax.local_devices()[0]
    state = memory.state_bytes(config, memory.Mesh(mesh.size, mesh.shape[sharding.FSDP], mesh.shape[sharding.TENSOR]))
    sampling = lambda: fit_batch.lower_sampling(config, device, *shapes.sampled)  # noqa: E731
    programs: list[tuple[str, Callable[[], Any], int]] = [("sampling", sampling, state)]
    if shapes.evaluates:
        local, parameters = multihost.local_mesh(mesh), 4 * num_params(config)
        beside = max(0, state - parameters)  # it reads the parameters of the state
        lower = fit_batch.lower_evaluation
        programs.append(("the evaluation", lambda: lower(config, local, rows, shapes.T), beside))
    fit_batch.check_all(programs, limit)
