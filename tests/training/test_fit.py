"""The training loop: cadence, resume, signals, errors. A toy step stands in for the model; the real one is tested with
its processes killed in test_kill.py."""

import dataclasses
import os
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.hardware import devices
from nanochat_jax.model.gpt import GPTConfig, flops_per_token
from nanochat_jax.parallel import sharding
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.training import anomalies, loop
from nanochat_jax.training.job import Evaluation, Rollout, TrainJob, TrainSettings
from nanochat_jax.training.loop import TrainingError
from nanochat_jax.training.optim import OptimHyper
from nanochat_jax.training.profile import Profile
from nanochat_jax.training.step import TrainState
from nanochat_jax.training.watchdog import HungError
from nanochat_jax.utils.errors import InputError
from tests.toy_params import on_one_device


@jax.jit
def toy_step(state: TrainState, x, y, w, limits):
    gradient = jnp.mean(x * w)
    params = {"a": state.params["a"] * 0.9 + gradient}
    loss = jnp.sum(params["a"])
    accepted = jnp.isfinite(gradient) & (loss <= limits[0]) & (gradient <= limits[1])
    params = {"a": jnp.where(accepted, params["a"], state.params["a"])}
    step = jnp.where(limits[0] == -jnp.inf, state.step, state.step + 1)
    numbers = {"loss": loss, "grad_norm": gradient, "accepted": accepted.astype(jnp.float32)}
    return TrainState(params, state.opt_state, step), numbers


def batches(start):
    step = start
    while True:
        x = np.random.default_rng(step).random((1, 2, 3), dtype=np.float32)
        yield x, x, np.ones_like(x)
        step += 1


def fresh() -> TrainState:
    return TrainState({"a": jnp.ones(3)}, {"m": jnp.zeros(2)}, jnp.int32(0))


class ToyJob(TrainJob):
    """A job with the toy step and state in place of the model's."""

    train_step: Any = staticmethod(toy_step)

    def abstract_state(self, padded: bool) -> TrainState:
        return target()


class DonatingJob(ToyJob):
    train_step: Any = staticmethod(jax.jit(toy_step, donate_argnums=0))


CONFIG = GPTConfig.from_depth(1, 64, 8)


def job(run, n=10, kind=ToyJob, **changes) -> TrainJob:
    flags = {f.name for f in dataclasses.fields(TrainSettings)}
    settings = {"save_every": 3, "sample_every": 0, "async_save": True, "hang_timeout": 0.0}
    settings |= {k: changes.pop(k) for k in flags & set(changes)}
    tokenizer: Any = None
    defaults = dict(
        stage="base",
        settings=TrainSettings(**settings),
        run=run,
        tokenizer=tokenizer,
        config=CONFIG,
        mesh=sharding.make_mesh(jax.devices()[:1]),
        hyper=OptimHyper(),
        schedule=lambda step: 1.0 - step / n,
        num_iterations=n,
        rows_per_step=2,
        sequence_len=3,
        sampled=(1, 1),
        batches=batches,
        evaluations=(Evaluation(bpb, 4),),
        sample=lambda params: ["text"],
    )
    return kind(**{**defaults, **changes})


def fit(job: TrainJob, state: TrainState, evaluated: bool = False):
    return loop.fit(job, state, {"stage": "base"}, evaluated)


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    monkeypatch.setattr(devices, "peak_flops", lambda: (1e12, "given"))


def bpb(params) -> dict[str, float]:
    return {"val_bpb": float(params["a"][0])}


def target():
    return on_one_device(fresh())


def resumed(run) -> tuple[TrainState, bool]:
    meta = checkpoint.load_meta(run)
    return checkpoint.restore(run, meta["step"], target()), meta["evaluated"]


def numbers(run):
    """What a run recorded, without the clock and the sessions."""
    timing = ("seconds", "tok_per_sec", "data_wait", "mfu")
    records = [r for r in metrics.read(run / "metrics.jsonl") if r["kind"] != "session"]
    return [{k: v for k, v in r.items() if k not in timing} for r in records]


def at(step, act, source=batches):
    """Batches of `source`; before that of `step` is given, act() is called."""

    def make(start):
        for i, batch in enumerate(source(start)):
            if start + i == step:
                act()
            yield batch

    return make


def power_cut():
    raise OSError("power cut")


def check_resumed(tmp_path, whole, **changes):
    """The run `cut`, started again, ends as the uninterrupted run `whole` did."""
    state, evaluated = resumed(tmp_path / "cut")
    again = fit(job(tmp_path / "cut", **changes), state, evaluated)
    assert again.finished and again.results == whole.results
    np.testing.assert_array_equal(again.state.params["a"], whole.state.params["a"])
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_cadence(tmp_path):
    outcome = fit(job(tmp_path), fresh())
    assert outcome.finished and int(outcome.state.step) == 10
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(10))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 4, 8, 10]
    assert [r["step"] for r in records if r["kind"] == "sample"] == [10], "0 means only at the end"
    assert checkpoint.steps(tmp_path) == [9, 10]
    for r in records:
        if r["kind"] == "train":
            assert r["tok_per_sec"] * r["seconds"] == pytest.approx(6)
            assert r["mfu"] == pytest.approx(flops_per_token(CONFIG) * r["tok_per_sec"] / 1e12)


@pytest.mark.parametrize("every", [0, -1])
def test_zero_or_negative_cadence_means_only_at_the_end(tmp_path, every):
    fit(job(tmp_path, evaluations=(Evaluation(bpb, every),), save_every=every), fresh())
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl") if r["kind"] == "eval"] == [10]
    assert checkpoint.steps(tmp_path) == [10]


def test_an_error_of_the_data_loses_nothing_saved_and_the_rest_is_identical(tmp_path):
    whole = fit(job(tmp_path / "whole"), fresh())
    with pytest.raises(OSError, match="power cut"):
        fit(job(tmp_path / "cut", batches=at(7, power_cut)), fresh())
    assert checkpoint.steps(tmp_path / "cut") == [3, 6]
    check_resumed(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["waiting for the batch of step 5", "in step 4"])
def test_signals_save_and_return_and_the_rest_is_identical(tmp_path, number, moment):
    whole = fit(job(tmp_path / "whole"), fresh())

    def send():
        os.kill(os.getpid(), number)

    def schedule(step):  # of the step whose numbers are read
        if step == 4 and moment.startswith("in"):
            send()
        return 1.0 - step / 10

    waiting = {"batches": at(5, send)} if moment.startswith("waiting") else {"schedule": schedule}
    stopped = fit(job(tmp_path / "cut", **waiting), fresh())
    assert not stopped.finished
    step = checkpoint.steps(tmp_path / "cut")[-1]
    assert step == int(stopped.state.step) == (5 if moment.startswith("waiting") else 6)
    check_resumed(tmp_path, whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers must be put back"


def test_a_wait_for_data_is_ended_by_sigterm_and_nothing_is_saved_twice(tmp_path, capfd, monkeypatch):
    def wait():
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(20)

    never, began = at(5, wait), time.monotonic()
    assert not fit(job(tmp_path, batches=never), fresh()).finished
    assert time.monotonic() - began < 10 and checkpoint.steps(tmp_path)[-1] == 5
    assert "stopped by SIGTERM at step 5" in capfd.readouterr().out
    state, evaluated = resumed(tmp_path)
    monkeypatch.setattr(checkpoint, "begin_save", lambda *a, **k: pytest.fail("step 5 is saved already"))
    assert not fit(job(tmp_path, batches=never), state, evaluated).finished


def test_a_finished_run_does_nothing_when_started_again(tmp_path):
    fit(job(tmp_path), fresh())
    before = (tmp_path / "metrics.jsonl").read_text()
    state, evaluated = resumed(tmp_path)
    again = fit(job(tmp_path, batches=lambda step: pytest.fail("no batch is needed")), state, evaluated)
    assert again.finished and "val_bpb" in again.results
    assert (tmp_path / "metrics.jsonl").read_text() == before


def expected_params(steps, but=()):
    """The parameter after so many steps, of which some are skipped."""
    a = np.ones(3, np.float32)
    for step, (x, _, _) in zip(range(steps), batches(0), strict=False):
        a = a if step in but else a * np.float32(0.9) + x.mean()
    return a


def poisoned(*steps, by=np.nan):
    def make(start):
        for i, (x, y, w) in enumerate(batches(start)):
            yield (x * np.float32(by) if start + i in steps else x), y, w

    return make


@pytest.mark.parametrize("bad", [[7], [4, 5], [0], [9]])  # 4, 9: their numbers are read before an evaluation, a save
def test_a_bad_step_is_skipped_and_changes_nothing(tmp_path, bad):
    outcome = fit(job(tmp_path, batches=poisoned(*bad)), fresh())
    np.testing.assert_allclose(outcome.state.params["a"], expected_params(10, but=bad), rtol=1e-6)
    assert int(outcome.state.step) == 10
    records = numbers(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "train"] == [s for s in range(10) if s not in bad]
    assert [(r["step"], r["loss"]) for r in records if r["kind"] == "skip"] == [(s, "nan") for s in bad]
    assert anomalies.steps(tmp_path) == bad
    for step in bad:
        kept = np.load(anomalies.folder(tmp_path, step) / "batch.npz")
        assert np.isnan(kept["inputs"]).all() and kept["inputs"].shape == (1, 2, 3)


def test_a_spike_is_skipped_once_the_usual_level_is_known(tmp_path):
    spikes = poisoned(5, 50, by=1000)
    whole = fit(job(tmp_path / "whole", n=60, batches=spikes, save_every=10), fresh())
    assert anomalies.steps(tmp_path / "whole") == [50], "before there is a level, only what is not finite is skipped"
    record = next(r for r in numbers(tmp_path / "whole") if r["kind"] == "skip")
    assert "where at most" in record["reason"]
    off = fit(job(tmp_path / "off", n=60, batches=spikes, spike=0), fresh())
    assert anomalies.steps(tmp_path / "off") == []
    assert float(off.state.params["a"][0]) > 2 * float(whole.state.params["a"][0])


@pytest.mark.parametrize("cut", [50, *(pytest.param(n, marks=pytest.mark.slow) for n in (49, 51))])
def test_a_resumed_run_skips_the_same_steps(tmp_path, cut):
    spikes = poisoned(48, 50, 51, by=30)
    whole = fit(job(tmp_path / "whole", n=60, batches=spikes, save_every=1), fresh())
    assert anomalies.steps(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        fit(job(tmp_path / "cut", n=60, batches=at(cut, power_cut, spikes), save_every=1), fresh())
    check_resumed(tmp_path, whole, n=60, batches=spikes, save_every=1)


def test_too_many_skips_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"3 steps .*step 9.*--matrix_lr"):
        fit(job(tmp_path, n=12, batches=poisoned(7, 8, 9), max_skips=3), fresh())
    assert checkpoint.steps(tmp_path)[-1] == 9 and anomalies.steps(tmp_path) == [7, 8, 9]
    assert [p.parent.name for p in (tmp_path / "incidents").glob("*/params")] == ["00000007"], "one copy is enough"
    state, evaluated = resumed(tmp_path)
    with pytest.raises(TrainingError, match="3 steps .*step 9"):  # the ones before are remembered
        fit(job(tmp_path, n=12, batches=poisoned(7, 8, 9), max_skips=3), state, evaluated)


def test_incidents_do_not_fill_the_disk(tmp_path):
    fit(job(tmp_path, n=30, batches=poisoned(*range(1, 30, 2))), fresh())
    assert len(anomalies.steps(tmp_path)) == anomalies.KEPT and anomalies.steps(tmp_path)[-1] == 29


def full_disk_at(step, monkeypatch) -> list[int]:
    """Saving that step fails; the steps that are saved."""
    publish, saved = checkpoint._publish, []

    def full(run, at, temporary, meta):
        if at == step:
            raise OSError(28, "No space left on device")
        publish(run, at, temporary, meta)
        saved.append(at)

    monkeypatch.setattr(checkpoint, "_publish", full)
    return saved


def test_a_failing_save_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    saved = full_disk_at(6, monkeypatch)

    def slowly(start):
        for batch in batches(start):
            time.sleep(0.05)
            yield batch

    with pytest.raises(checkpoint.CheckpointError, match=r"step 6.*No space left.*00000003"):
        fit(job(tmp_path, n=100, batches=slowly), fresh())
    assert saved == [3]
    steps = [r["step"] for r in numbers(tmp_path) if r["kind"] == "train"]
    assert steps[-1] < 90, "not only at the end"


def test_a_failing_last_save_is_no_success(tmp_path, monkeypatch):
    full_disk_at(3, monkeypatch)
    with pytest.raises(checkpoint.CheckpointError, match="step 3"):
        fit(job(tmp_path, n=3), fresh())


def test_the_loop_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is written is the state at the time of the call, whatever the loop does to its buffers meanwhile."""
    publish, during = checkpoint._publish, []

    def slow(run, step, temporary, meta):
        time.sleep(0.5)
        during.append(len(numbers(tmp_path)))
        publish(run, step, temporary, meta)

    monkeypatch.setattr(checkpoint, "_publish", slow)
    fit(job(tmp_path, n=40, kind=DonatingJob, evaluations=(), save_every=20, keep=0), fresh())
    assert during[0] > 25, "the loop waited for the disk"
    saved = checkpoint.restore(tmp_path, 20, target()).params["a"]
    np.testing.assert_allclose(saved, expected_params(20), rtol=1e-5)


def test_a_step_that_hangs_leaves_a_checkpoint_and_says_where_it_hangs(tmp_path, capfd):
    def stuck():
        threading.Event().wait(60)

    began = time.monotonic()
    with pytest.raises(HungError, match="step 7.* step 7"):
        fit(job(tmp_path, batches=at(7, stuck), hang_timeout=1.0), fresh())
    assert time.monotonic() - began < 30
    shown = capfd.readouterr().err
    assert "--hang_timeout" in shown and "in stuck" in shown and "watchdog" in shown
    state, evaluated = resumed(tmp_path)
    fit(job(tmp_path), state, evaluated)
    assert [r["step"] for r in numbers(tmp_path) if r["kind"] == "train"] == list(range(10))
    records = metrics.read(tmp_path / "metrics.jsonl")
    (noted,) = [r for r in records if r["kind"] == "incident"]  # for the report; a resumed run keeps it
    assert (noted["step"], noted["what"]) == (7, "hang") and noted["seconds"] > 1


def test_several_evaluations_keep_their_own_cadence(tmp_path):
    slow = Evaluation(lambda params: {"accuracy": 0.5}, 5, at_start=False)
    outcome = fit(job(tmp_path, n=9, evaluations=(Evaluation(bpb, 4), slow)), fresh())
    evals = {r["step"]: set(r) & {"val_bpb", "accuracy"} for r in numbers(tmp_path) if r["kind"] == "eval"}
    assert evals == {0: {"val_bpb"}, 4: {"val_bpb"}, 5: {"accuracy"}, 8: {"val_bpb"}, 9: {"val_bpb", "accuracy"}}
    assert set(outcome.results) == {"val_bpb", "accuracy"}


def rollout(params, step) -> Rollout:
    """A batch that depends on the parameters, as reinforcement learning makes them."""
    x = np.random.default_rng(step).random((1, 2, 3), dtype=np.float32) * float(params["a"][0])
    return Rollout((x, x, np.ones_like(x)), {"reward": float(x.sum())}, [{"text": f"said at {step}"}])


def test_rollouts_see_the_newest_parameters_and_resume_exactly(tmp_path):
    whole = fit(job(tmp_path / "whole", batches=None, rollout=rollout), fresh())
    a, rewards = 1.0, []
    for step in range(10):
        x = np.random.default_rng(step).random((1, 2, 3), dtype=np.float32) * np.float32(a)
        rewards.append(float(x.sum()))
        a = np.float32(a) * np.float32(0.9) + x.mean()
    records = numbers(tmp_path / "whole")
    assert [r["reward"] for r in records if r["kind"] == "train"] == pytest.approx(rewards, rel=1e-5)
    assert [r["samples"] for r in records if r["kind"] == "transcripts"][3] == [{"text": "said at 3"}]

    def breaks(params, step):
        return power_cut() if step == 7 else rollout(params, step)

    with pytest.raises(OSError, match="power cut"):
        fit(job(tmp_path / "cut", batches=None, rollout=breaks), fresh())
    check_resumed(tmp_path, whole, batches=None, rollout=rollout)
    sessions = [r for r in metrics.read(tmp_path / "cut" / "metrics.jsonl") if r["kind"] == "session"]
    assert [r["step"] for r in sessions] == [0, 6] and all(r["versions"]["jax"] for r in sessions)


def test_profiled_steps_leave_a_trace_in_the_runs_folder(tmp_path):
    fit(job(tmp_path, 4, profile_steps="1:3"), fresh())
    assert list(tmp_path.rglob("profile/**/*.xplane.pb"))
    assert [r["step"] for r in numbers(tmp_path) if r["kind"] == "train"] == [0, 1, 2, 3]


@pytest.mark.parametrize("steps", ["3", "3:3", "4:3", "a:b"])
def test_what_is_no_span_of_steps_is_refused(tmp_path, steps):
    with pytest.raises(InputError, match="--profile_steps.*10:13"):
        Profile(steps, tmp_path)
