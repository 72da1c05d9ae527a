"""The training loop: cadence, resume, signals, errors. A toy step stands in for the model; the real one is tested with
its processes killed in test_kill.py."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import checkpoint, metrics
from nanochat_jax.train import Evaluation, Job, Rollout, TrainingError, fit
from nanochat_jax.train_step import TrainState


@jax.jit
def toy_step(state: TrainState, x, y, w):
    gradient = jnp.mean(x * w)
    params = {"a": state.params["a"] * 0.9 + gradient}
    return TrainState(params, state.opt_state, state.step + 1), {"loss": jnp.sum(params["a"]), "grad_norm": gradient}


def batches(start):
    step = start
    while True:
        x = np.random.default_rng(step).random((1, 2, 3), dtype=np.float32)
        yield x, x, np.ones_like(x)
        step += 1


def fresh() -> TrainState:
    return TrainState({"a": jnp.ones(3)}, {"m": jnp.zeros(2)}, jnp.int32(0))


def job(run, n=10, **changes) -> Job:
    defaults = dict(
        run=run,
        num_iterations=n,
        train_step=toy_step,
        batches=batches,
        meta={"stage": "base"},
        tokens_per_step=6,
        evaluations=(Evaluation(bpb, 4),),
        sample=lambda params: ["text"],
        save_every=3,
    )
    return Job(**{**defaults, **changes})


def bpb(params) -> dict[str, float]:
    return {"val_bpb": float(params["a"][0])}


def resumed(run) -> tuple[TrainState, bool]:
    meta = checkpoint.load_meta(run)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), fresh())
    return checkpoint.restore(run, meta["step"], target), meta["evaluated"]


def numbers(run):
    """What a run recorded, without the clock and the sessions."""
    timing = ("seconds", "tok_per_sec", "data_wait", "mfu")
    records = [r for r in metrics.read(run / "metrics.jsonl") if r["kind"] != "session"]
    return [{k: v for k, v in r.items() if k not in timing} for r in records]


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


@pytest.mark.parametrize("every", [0, -1])
def test_zero_or_negative_cadence_means_only_at_the_end(tmp_path, every):
    fit(job(tmp_path, evaluations=(Evaluation(bpb, every),), save_every=every), fresh())
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl") if r["kind"] == "eval"] == [10]
    assert checkpoint.steps(tmp_path) == [10]


def test_resume_gives_the_same_records_and_state(tmp_path):
    whole = fit(job(tmp_path / "whole"), fresh())
    (tmp_path / "cut").mkdir()

    def stops_at(step):
        def stop(params):
            raise RuntimeError("power cut")

        return stop

    with pytest.raises(RuntimeError, match="power cut"):
        fit(job(tmp_path / "cut", sample_every=8, sample=stops_at(8)), fresh())
    assert checkpoint.steps(tmp_path / "cut")[-1] == 6
    state, evaluated = resumed(tmp_path / "cut")
    again = fit(job(tmp_path / "cut"), state, evaluated)
    np.testing.assert_array_equal(again.state.params["a"], whole.state.params["a"])
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_return_and_the_rest_is_identical(tmp_path, number):
    whole = fit(job(tmp_path / "whole"), fresh())

    def with_signal(start):
        for i, batch in enumerate(batches(start)):
            if start + i == 5:
                os.kill(os.getpid(), number)
            yield batch

    stopped = fit(job(tmp_path / "cut", batches=with_signal), fresh())
    assert not stopped.finished
    step = checkpoint.steps(tmp_path / "cut")[-1]
    assert step == int(stopped.state.step) == 6
    state, evaluated = resumed(tmp_path / "cut")
    again = fit(job(tmp_path / "cut"), state, evaluated)
    assert again.finished and again.results == whole.results
    np.testing.assert_array_equal(again.state.params["a"], whole.state.params["a"])
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers must be put back"


def test_a_finished_run_does_nothing_when_started_again(tmp_path):
    fit(job(tmp_path), fresh())
    before = (tmp_path / "metrics.jsonl").read_text()
    state, evaluated = resumed(tmp_path)
    again = fit(job(tmp_path, batches=lambda step: pytest.fail("no batch is needed")), state, evaluated)
    assert again.finished and "val_bpb" in again.results
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    def poisoned(start):
        for i, (x, y, w) in enumerate(batches(start)):
            yield (x * np.nan if start + i == 7 else x), y, w

    with pytest.raises(TrainingError, match=r"step 7.*last good checkpoint is step 6.*--matrix_lr"):
        fit(job(tmp_path, batches=poisoned), fresh())
    assert checkpoint.steps(tmp_path)[-1] == 6


def test_errors_of_the_data_reach_the_caller_and_nothing_saved_is_lost(tmp_path):
    def breaks(start):
        for i, batch in enumerate(batches(start)):
            if start + i == 7:
                raise OSError("disk went away")
            yield batch

    with pytest.raises(OSError, match="disk went away"):
        fit(job(tmp_path, batches=breaks), fresh())
    assert checkpoint.steps(tmp_path) == [3, 6]


def test_mfu_uses_the_given_peak(tmp_path):
    fit(job(tmp_path, n=3, flops_per_token=100, peak_flops=1e6), fresh())
    for r in metrics.read(tmp_path / "metrics.jsonl"):
        if r["kind"] == "train":
            assert r["mfu"] == pytest.approx(100 * r["tok_per_sec"] / 1e6)


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
        if step == 7:
            raise RuntimeError("power cut")
        return rollout(params, step)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(job(tmp_path / "cut", batches=None, rollout=breaks), fresh())
    state, evaluated = resumed(tmp_path / "cut")
    again = fit(job(tmp_path / "cut", batches=None, rollout=rollout), state, evaluated)
    np.testing.assert_array_equal(again.state.params["a"], whole.state.params["a"])
    assert numbers(tmp_path / "cut") == records
    sessions = [r for r in metrics.read(tmp_path / "cut" / "metrics.jsonl") if r["kind"] == "session"]
    assert [r["step"] for r in sessions] == [0, 6] and all(r["versions"]["jax"] for r in sessions)
