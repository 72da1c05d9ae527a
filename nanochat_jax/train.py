"""`fit`: the one training loop of every stage.

Step k of a run is: evaluate, sample, save (all before the update, so that a checkpoint of step k holds k updates), then
one update. The host stays one step ahead of the device: step k is dispatched before the numbers of step k - 1 are read
(except where a batch is made by the model itself, as in reinforcement learning).
"""

import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanochat_jax import checkpoint, devices, metrics
from nanochat_jax.progress import Progress
from nanochat_jax.train_step import TrainState

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets, weights: (A, B, T)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what to do."""


@dataclass(frozen=True)
class Evaluation:
    """Numbers measured on the model now and then: `measure(params)` gives for example {"val_bpb": 1.2}."""

    measure: Callable[[Any], dict[str, float]]
    every: int = 0  # 0 or negative: only at the end (the reference treats -1 as every step)
    at_start: bool = True  # also before the first update, where it is due every so many steps


@dataclass(frozen=True)
class Rollout:
    """A batch that the model made itself, the numbers to log with its step, and texts to keep."""

    batch: Batch
    numbers: dict[str, float] = field(default_factory=dict)
    transcripts: list[dict] = field(default_factory=list)


@dataclass
class Job:
    """What a stage gives the loop. Callables keep `fit` free of data sets, models and flags.

    Batches come from `batches` (from a step on; a pure function of the step) or from `rollout` (a pure function of the
    parameters and the step).
    """

    run: Path
    num_iterations: int
    train_step: Any  # the jitted step of `train_step.make_train_step`
    meta: dict  # saved with every checkpoint: stage, config, tokenizer_hash, settings
    tokens_per_step: int
    batches: Callable[[int], Iterator[Batch]] | None = None
    rollout: Callable[[Any, int], Rollout] | None = None
    flops_per_token: int = 0
    peak_flops: float = 0.0  # of all devices together
    evaluations: tuple[Evaluation, ...] = ()
    sample: Callable[[Any], list[str]] | None = None
    sample_every: int = 0  # 0 or negative: only at the end
    sample_at_start: bool = False  # also before the first update: there is a model already
    save_every: int = 0
    keep: int = 2
    sinks: dict[str, metrics.Sink] = field(default_factory=dict)
    schedule: Callable[[int], dict[str, float]] = lambda step: {}  # shown and logged beside the loss
    to_saved: Callable[[TrainState], Any] = lambda state: state  # device-independent form of the state


@dataclass
class Outcome:
    state: TrainState
    finished: bool  # False: stopped by a signal, with a checkpoint to go on from
    results: dict[str, float]  # the last evaluation


def fit(job: Job, state: TrainState, evaluated: bool = False) -> Outcome:
    """Runs the job from the state's step to its end.

    Ctrl-C and SIGTERM save and return with `finished` False; a second Ctrl-C stops at once. `evaluated` says that the
    evaluation of the first step was already done and recorded (a resumed run). Raises TrainingError when the loss is no
    longer finite.
    """
    start, n = int(state.step), job.num_iterations
    metrics.rewind(job.run / "metrics.jsonl", start, keep_eval=evaluated)
    log = metrics.MetricsLog(job.run / "metrics.jsonl", job.sinks)
    earlier = metrics.read(job.run / "metrics.jsonl")
    results = _last_results(earlier)
    smooth = _Smoothed([r["loss"] for r in earlier if r["kind"] == "train"])
    batches: Iterator[Batch] | None = None
    try:
        with stop_on_signals() as stop, Progress(n, start) as progress:
            compiled = None
            pending: _Pending | None = None
            clock = _Clock()
            if start < n:
                log.write({"kind": "session", "step": start, **devices.session()})
            for step in range(start, n + 1):
                last, resumed = step == n, step == start and evaluated
                evals_now = [] if resumed else [e for e in job.evaluations if last or _eval_due(step, e)]
                before = step == 0 and job.sample_at_start
                sample_now = not resumed and (last or before or (step > 0 and _due(step, job.sample_every)))
                save_now = last or (step > start and _due(step, job.save_every))
                # all of them, and a rollout, need the numbers of the step before
                if stop or evals_now or sample_now or save_now or job.rollout is not None:
                    pending = _finish(pending, job, log, smooth, progress, clock)
                if stop:
                    _save(job, state, step, evaluated=resumed)
                    progress.say(f"stopped by {stop[0]} at step {step}; saved. The same command goes on from here.")
                    return Outcome(state, False, results)
                if evals_now:
                    began = time.perf_counter()
                    new = {k: v for e in evals_now for k, v in e.measure(state.params).items()}
                    results = {**results, **new}
                    log.write({"kind": "eval", "step": step, **new, "seconds": time.perf_counter() - began})
                    progress.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in new.items()))
                if sample_now and job.sample is not None:
                    texts = job.sample(state.params)
                    log.write({"kind": "sample", "step": step, "texts": texts})
                    progress.say("\n".join(f"  {text!r}" for text in texts))
                if save_now and not (resumed and last):
                    _save(job, state, step, evaluated=True)
                if last:
                    break
                extra: dict[str, float] = {}
                if job.rollout is not None:
                    clock.restart()
                    rollout = job.rollout(state.params, step)
                    batch, extra = rollout.batch, rollout.numbers
                    if rollout.transcripts:
                        log.write({"kind": "transcripts", "step": step, "samples": rollout.transcripts})
                else:
                    assert job.batches is not None, "a job has either batches or rollouts"
                    if batches is None:
                        batches = job.batches(step)
                    clock.wait_begins()
                    batch = next(batches)
                    clock.wait_ends()
                if compiled is None:  # once, ahead of time: a changed shape later is an error, not a silent recompile
                    compiled = _compile(job, state, batch, progress)
                    if job.rollout is None:
                        clock.restart()
                state, numbers = compiled(state, *batch)
                if job.rollout is None:
                    pending = _finish(pending, job, log, smooth, progress, clock)
                pending = _Pending(step, numbers, extra)
        return Outcome(state, True, results)
    finally:
        if batches is not None and hasattr(batches, "close"):
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
        log.close()


def _eval_due(step: int, evaluation: Evaluation) -> bool:
    return _due(step, evaluation.every) and (step > 0 or evaluation.at_start)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclass
class _Pending:
    step: int
    numbers: dict[str, jax.Array]
    extra: dict[str, float]  # of the rollout that the step learnt from


class _Smoothed:
    """The reference's displayed loss: an average with weight 0.9 on the past, corrected for its start at zero."""

    def __init__(self, losses: list[float]):
        self._total, self._steps = 0.0, 0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> float:
        self._steps += 1
        self._total = 0.9 * self._total + 0.1 * loss
        return self._total / (1 - 0.9**self._steps)


class _Clock:
    """Time per step and the share of it spent waiting for data."""

    def __init__(self):
        self.seconds: deque[float] = deque(maxlen=50)
        self._mark = self._wait_mark = time.perf_counter()
        self._waited = 0.0

    def restart(self) -> None:
        self._mark, self._waited = time.perf_counter(), 0.0

    def wait_begins(self) -> None:
        self._wait_mark = time.perf_counter()

    def wait_ends(self) -> None:
        self._waited += time.perf_counter() - self._wait_mark

    def lap(self) -> tuple[float, float]:
        """(seconds since the last lap, of which waiting for data)."""
        now = time.perf_counter()
        seconds, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        self.seconds.append(seconds)
        return seconds, min(waited, seconds)


def _finish(pending: _Pending | None, job: Job, log, smooth: _Smoothed, progress: Progress, clock: _Clock) -> None:
    """Reads the numbers of a dispatched step (waiting for it), logs and shows them."""
    if pending is None:
        clock.restart()
        return
    loss, grad_norm = float(pending.numbers["loss"]), float(pending.numbers["grad_norm"])
    seconds, waited = clock.lap()
    if not (np.isfinite(loss) and np.isfinite(grad_norm)):
        done = checkpoint.steps(job.run)
        where = f"the last good checkpoint is step {done[-1]}" if done else "no checkpoint was written yet"
        raise TrainingError(
            f"loss {loss}, gradient norm {grad_norm} at step {pending.step}: training cannot go on ({where}). "
            "Lower the learning rates (--matrix_lr, --embedding_lr, --unembedding_lr) or look at the data of this step."
        )
    record = {
        "kind": "train",
        "step": pending.step,
        "loss": loss,
        "grad_norm": grad_norm,
        **pending.extra,
        **job.schedule(pending.step),
        "seconds": seconds,
        "tok_per_sec": job.tokens_per_step / seconds,
        "data_wait": waited / seconds,
    }
    if job.peak_flops:
        record["mfu"] = job.flops_per_token * record["tok_per_sec"] / job.peak_flops
    log.write(record)
    left = statistics.median(clock.seconds) * (job.num_iterations - pending.step - 1)
    progress.step(record, smooth.add(loss), left)


def _compile(job: Job, state: TrainState, batch: Batch, progress: Progress):
    began = time.perf_counter()
    compiled = job.train_step.lower(state, *batch).compile()
    memory = compiled.memory_analysis()
    peak = f", {memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries per device" if memory else ""
    progress.say(f"train step compiled in {time.perf_counter() - began:.1f} s{peak}")
    return compiled


def _save(job: Job, state: TrainState, step: int, evaluated: bool) -> None:
    checkpoint.save(job.run, step, job.to_saved(state), {**job.meta, "evaluated": evaluated}, keep=job.keep)


def _last_results(records: list[dict]) -> dict[str, float]:
    """The newest value of every evaluated number."""
    results: dict[str, float] = {}
    for record in records:
        if record["kind"] == "eval":
            results.update({k: v for k, v in record.items() if k not in ("kind", "step", "seconds")})
    return results


@contextmanager
def stop_on_signals():
    """A list that becomes non-empty (the signal's name) on SIGTERM or the first Ctrl-C; the second Ctrl-C raises."""
    stop: list[str] = []

    def request(number, frame):
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(signal.Signals(number).name)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:  # not the main thread: signals are the caller's business
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
