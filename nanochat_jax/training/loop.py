"""`fit`: the one training loop of every stage.

Step k of a run is: evaluate, sample, save (all before the update, so that a checkpoint of step k holds k updates), then
one update. The host stays one step ahead of the device: step k is dispatched before the numbers of step k - 1 are read
(except where a batch is made by the model itself, as in reinforcement learning).

A step that must not be trained on (see `anomalies.py`) leaves the state as it was; the step dispatched after it is
held back by the device itself, so that the state is still the same when the host sees what happened.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.hardware import devices
from nanochat_jax.hardware.devices import OutOfMemory
from nanochat_jax.model.gpt import flops_per_token
from nanochat_jax.parallel import multihost
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.runs.saving import Saver
from nanochat_jax.training import anomalies
from nanochat_jax.training.job import Batch, Evaluation, Outcome, TrainJob
from nanochat_jax.training.profile import Profile
from nanochat_jax.training.shutdown import Interrupted, Stop, stop_on_signals
from nanochat_jax.training.step import TrainState, strip_padding
from nanochat_jax.training.watchdog import HungError, Watchdog
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.progress import Clock, Progress, Smoothed


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; the message says what happened and what to do."""


def fit(job: TrainJob, state: TrainState, meta: dict[str, Any], evaluated: bool = False) -> Outcome:
    """Runs the job from the state's step to its end.

    Arguments:
        state: of the step to begin with; it is donated.
        meta: saved with every checkpoint: stage, config, tokenizer_hash, identity, settings, ...
        evaluated: the evaluation of the first step was already done and recorded (a resumed run).

    Ctrl-C and SIGTERM save and return with `finished` False; a second Ctrl-C stops at once. Raises TrainingError when
    `max_skips` steps in a row had to be skipped, CheckpointError when saving fails, HungError when a step hangs,
    OutOfMemory when a device runs out of memory; before the last two the state is saved if it can still be read.
    """
    return _Loop(job, state, meta, evaluated).run()


class _Loop:
    """One run of `fit`: the state, the step whose numbers are still on the device, and those who watch."""

    def __init__(self, job: TrainJob, state: TrainState, meta: dict[str, Any], evaluated: bool):
        settings = job.settings
        self.job, self.settings, self.meta = job, settings, meta
        self.state, self.start, self.evaluated = state, int(state.step), evaluated
        self.stored = job.abstract_state(padded=False)
        log, main = job.run / "metrics.jsonl", multihost.is_main()
        if main:
            metrics.rewind(log, self.start, keep_eval=evaluated)
        multihost.barrier("metrics")
        earlier = metrics.read(log)
        self.results = _last_results(earlier)
        self.level = anomalies.Level(settings.spike, earlier)
        self.skips = anomalies.skipped_in_a_row(earlier)
        self.smooth = Smoothed([r["loss"] for r in earlier if r["kind"] == "train"])
        sinks = metrics.open_sinks(settings.sinks, job.run.name, job.run, meta.get("settings", {})) if main else {}
        self.log = metrics.MetricsLog(log if main else None, sinks)
        self.peak = devices.Peak(_peak_flops() * job.mesh.size) if main else None
        self.saver = Saver(job.run, settings.keep, settings.keep_every, settings.async_save)
        self.profile = Profile(settings.profile_steps, job.run)
        self.clock = Clock()
        self.pending: _Pending | None = None
        self.compiled: Any = None

    def run(self) -> Outcome:
        job, n = self.job, self.job.num_iterations
        batches: Iterator[Batch] | None = None
        try:
            with (
                stop_on_signals() as stop,
                Progress(n, self.start) as self.progress,
                Watchdog(self.settings.hang_timeout, noted=self._note_hang) as self.watchdog,
            ):
                if self.start < n:
                    self.log.write({"kind": "session", "step": self.start, **devices.session()})
                for step in range(self.start, n + 1):
                    # 1. a checkpoint that could not be written in the background ends the run here
                    self.saver.check()
                    self.watchdog.step_begins(step)
                    with self._state_saved_on_failure(step):
                        # 2. what is due before the update: stop, evaluate, sample, save
                        if not self._between_steps(step, stop):
                            break
                        # 3. the batch, from the data or made by the model
                        if batches is None and job.batches is not None:
                            batches = job.batches(step)
                        try:
                            batch, numbers = self._next_batch(step, batches, stop)
                        except Interrupted as signal:
                            self._stop(step, evaluated=True, why=str(signal))
                            break
                        # 4. dispatch the update; then read, log and show the numbers of the step before
                        self._one_step(step, batch, numbers)
                # 5. the last checkpoint must be on disk
                self.watchdog.step_begins(n)
                with self.watchdog.busy():
                    self.saver.close()
                return Outcome(self.state, not stop.name or int(self.state.step) == n, self.results)
        except Exception:
            self.saver.give_up()
            raise
        finally:
            self.profile.stop()
            if batches is not None and hasattr(batches, "close"):
                batches.close()  # pyright: ignore[reportAttributeAccessIssue]
            self.log.close()

    @contextlib.contextmanager
    def _state_saved_on_failure(self, step: int) -> Iterator[None]:
        """Saves the state, if it can be read, before a hang or an exhausted memory ends the run."""
        try:
            yield
        except HungError as error:
            self._save_what_is_left(step)
            raise HungError(f"{error}; {self._last_good()}. The same command resumes from there.") from None
        except jax.errors.JaxRuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            rows = self.settings.device_batch_size
            self.log.write({"kind": "incident", "step": step, "what": "out of memory", "rows": rows})
            with self.watchdog.busy():
                self._save_what_is_left(step)
            what = str(error).splitlines()[0]
            raise OutOfMemory(f"a device ran out of memory at step {step} ({what}); {self._last_good()}") from None

    def _between_steps(self, step: int, stop: Stop) -> bool:
        """Evaluates, samples and saves what is due before the update of `step`; False if there is to be none."""
        job, settings = self.job, self.settings
        last, resumed = step == job.num_iterations, step == self.start and self.evaluated
        # 1. what is due
        evals_now = [] if resumed else [e for e in job.evaluations if last or _eval_due(step, e)]
        before = step == 0 and job.parent is not None  # there is a model already
        sample_now = not resumed and (last or before or (step > 0 and _due(step, settings.sample_every)))
        save_now = last or (step > self.start and _due(step, settings.save_every))
        # 2. a signal: save and stop
        if stopped := stop_requested(stop, step):
            self._stop(step, evaluated=resumed, why=stopped)
            return False
        # 3. all of them, and a rollout, need the numbers of the step before
        if evals_now or sample_now or save_now or job.rollout is not None:
            self._settle()
        # 4. evaluate
        if evals_now:
            began = time.perf_counter()
            with self.watchdog.busy():
                params = self._local_params()
                new = {k: v for e in evals_now for k, v in e.measure(params).items()}
            self.results = {**self.results, **new}
            self.log.write({"kind": "eval", "step": step, **new, "seconds": time.perf_counter() - began})
            self.progress.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in new.items()))
        # 5. sample
        if sample_now and job.sample is not None:
            with self.watchdog.busy():
                texts = job.sample(self._local_params())
            self.log.write({"kind": "sample", "step": step, "texts": texts})
            self.progress.say("\n".join(f"  {text!r}" for text in texts))
        # 6. save
        if save_now and not (resumed and last):
            with self.watchdog.busy():
                self._save(step, evaluated=True)
        return not last

    def _stop(self, step: int, evaluated: bool, why: str) -> None:
        """Ends the run before the update of `step`, with a checkpoint to resume from."""
        self._settle()
        with self.watchdog.busy():
            self.saver.close()
            if not multihost.agree(step in checkpoint.steps(self.job.run)):
                self._save(step, evaluated)
                self.saver.close()
        self.progress.say(f"stopped by {why} at step {step}; saved. The same command resumes from here.")

    def _next_batch(self, step: int, batches: Iterator[Batch] | None, stop: Stop) -> tuple[Batch, dict[str, float]]:
        """The batch of `step`, and numbers to log with it. Raises Interrupted when a signal ends the wait for it."""
        if self.job.rollout is not None:
            self.clock.restart()
            rollout = self.job.rollout(self._local_params(), step)
            if rollout.transcripts:
                self.log.write({"kind": "transcripts", "step": step, "samples": rollout.transcripts})
            return rollout.batch, rollout.numbers
        assert batches is not None, "a job has either batches or rollouts"
        self.clock.wait_begins()
        with stop.ends_this():
            batch = next(batches)
        self.clock.wait_ends()
        return batch, {}

    def _one_step(self, step: int, batch: Batch, extra: dict[str, float]) -> None:
        """Dispatches the update of `step` and settles the one before; `extra`: numbers to log with it."""
        rollout = self.job.rollout is not None
        # 1. on the devices; the largest loss and gradient norm that this step may have
        placed, limits = multihost.place_batch(self.job.mesh, batch, whole=rollout), self.level.limits(step)
        # 2. compile once, ahead of time: a changed shape later is an error, not a silent recompile
        if self.compiled is None:
            self.progress.say("compiling the training step ...")  # minutes for a large model, in which nothing moves
            with self.watchdog.busy():
                self.compiled = _compile(self.job, self.state, placed, limits, self.progress)
            if not rollout:
                self.clock.restart()
        with self.watchdog.busy():
            self.profile.step_begins(step, self._settle)
        # 3. dispatch, before the step before is known to be accepted: if it is not, the device holds this one back
        given = limits if self.pending is None else _limits_if_accepted(self.pending.numbers["accepted"], limits)
        self.state, numbers = self.compiled(self.state, *placed, given)
        # 4. the numbers of the step before; if it was skipped, dispatch this one again
        if self._settle():
            self.state, numbers = self.compiled(self.state, *placed, limits)
        self.pending = _Pending(step, numbers, extra, placed, limits)

    def _settle(self) -> bool:
        """Reads the numbers of the dispatched step (waiting for it), logs and shows them; whether it was skipped."""
        pending, self.pending = self.pending, None
        if pending is None:
            self.clock.restart()
            return False
        job, step = self.job, pending.step
        loss, grad_norm, accepted = (float(pending.numbers[k]) for k in ("loss", "grad_norm", "accepted"))
        seconds, waited = self.clock.lap()
        self.watchdog.step_done()
        if not accepted:
            self._skip(pending, loss, grad_norm)
            return True
        self.skips = 0
        self.level.add(step, loss, grad_norm)
        record = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            **pending.extra,
            "lr_multiplier": job.schedule(step),
            "seconds": seconds,
            "tok_per_sec": job.tokens_per_step / seconds,
            "data_wait": waited / seconds,
        }
        if self.peak is not None:
            record["mfu"] = self.peak.share(flops_per_token(job.config) * record["tok_per_sec"])
        self.log.write(record)
        left = statistics.median(self.clock.seconds) * (job.num_iterations - step - 1)
        self.progress.step(record, self.smooth.add(loss), left)
        return False

    def _skip(self, pending: "_Pending", loss: float, grad_norm: float) -> None:
        """Saves what a skipped step was made of; ends the run when there are too many in a row."""
        job, step = self.job, pending.step
        self.skips += 1
        why = anomalies.reason(loss, grad_norm, pending.limits)
        numbers = {"loss": anomalies.plain(loss), "grad_norm": anomalies.plain(grad_norm)}
        limits = [anomalies.plain(float(x)) for x in pending.limits]
        facts = {**numbers, "limits": limits, "reason": why, "backend": jax.default_backend(), "meta": self.meta}
        with self.watchdog.busy():
            batch = multihost.whole_batch(pending.batch)
            kept = anomalies.keep(job.run, step, batch, self.state.params, facts, self.skips)
        self.log.write({"kind": "skip", "step": step, **numbers, "reason": why, **pending.extra})
        replay = f"python -m scripts.replay {job.run.name} {step}"
        self.progress.say(f"step {step} skipped: {why}; its batch is saved in {kept} (`{replay}`)")
        if self.skips >= self.settings.max_skips:
            raise TrainingError(
                f"{self.skips} steps in a row up to step {step} had to be skipped, the last one with {why}: training "
                f"cannot continue ({self._last_good()}). `{replay}` shows what happened in it. Lower the learning "
                "rates (--matrix_lr, --embedding_lr, --unembedding_lr), or look at the data."
            )
        self.clock.restart()

    def _local_params(self) -> Any:
        """The parameters as evaluations, samples and rollouts see them: unsharded on this process's devices."""
        return multihost.local(self.state.params, self.job.mesh)

    def _save(self, step: int, evaluated: bool) -> None:
        self.saver.save(step, strip_padding(self.state, self.stored), {**self.meta, "evaluated": evaluated})

    def _save_what_is_left(self, step: int) -> None:
        """After a hang or an exhausted memory: a checkpoint, if the devices still have the state (if they do not answer
        at all, the watchdog ends the process)."""
        try:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
                return
            self._settle()
            at = int(jax.block_until_ready(self.state).step)
        except jax.errors.JaxRuntimeError:  # computed from what failed
            return
        if at not in checkpoint.steps(self.job.run):
            self._save(at, evaluated=False)
        self.saver.close()

    def _note_hang(self, step: int, waited: float) -> None:
        self.log.write({"kind": "incident", "step": step, "what": "hang", "seconds": waited})

    def _last_good(self) -> str:
        self.saver.close()
        done = checkpoint.steps(self.job.run)
        return f"the last good checkpoint is step {done[-1]}" if done else "no checkpoint was written yet"


def _peak_flops() -> float:
    peak, source = devices.peak_flops()
    print(f"peak for MFU: {peak / 1e12:.3g} TFLOP/s per device ({source})")
    return peak


@jax.jit
def _limits_if_accepted(accepted: jax.Array, limits: jax.Array) -> jax.Array:
    """Limits that nothing passes if the step before was not accepted."""
    return jnp.where(accepted > 0, limits, anomalies.HELD)


def stop_requested(stop: Stop, step: int) -> str:
    """The signal that asks all processes to stop before this step, or ""."""
    if not multihost.several():
        return stop.name
    return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""


def _eval_due(step: int, evaluation: Evaluation) -> bool:
    return _due(step, evaluation.every) and (step > 0 or evaluation.at_start)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclass
class _Pending:
    step: int
    numbers: dict[str, jax.Array]
    extra: dict[str, float]  # of the rollout that the step is trained on
    batch: Any  # as placed on the devices
    limits: np.ndarray


def _compile(job: TrainJob, state: TrainState, batch: Batch, limits: np.ndarray, progress: Progress):
    began = time.perf_counter()
    compiled = job.train_step.lower(state, *batch, limits).compile()
    memory = compiled.memory_analysis()
    peak = f", {memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries per device" if memory else ""
    progress.say(f"train step compiled in {time.perf_counter() - began:.1f} s{peak}")
    return compiled


def _last_results(records: list[dict]) -> dict[str, float]:
    """The newest value of every evaluated number."""
    results: dict[str, float] = {}
    for record in records:
        if record["kind"] == "eval":
            results.update({k: v for k, v in record.items() if k not in ("kind", "step", "seconds")})
    return results
