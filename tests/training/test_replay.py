"""A skipped step of real training, found again by scripts.replay."""

import json
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import abstract
from nanochat_jax.parallel import sharding
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.stages import base, pipeline
from nanochat_jax.training import anomalies, job, replay
from nanochat_jax.training.optim import OptimHyper, make_optimizer
from nanochat_jax.training.step import state_of
from tests import toy_runs
from tests.toy_params import on_one_device

BAD_STEP, BAD_ROW = 2, 5


STEPS: list[Any] = []  # the training step of the run below


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps in the third of which one row weighs infinitely much."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        toy_runs.use(home, patch)
        honest, make_train_step = pipeline.micro_batches, job.make_train_step

        def poisoned(loader, step, accumulation, mesh):
            for at, (x, y, w) in enumerate(honest(loader, step, accumulation, mesh), step):
                if at == BAD_STEP:
                    w = w.copy()
                    w.reshape(-1, w.shape[-1])[BAD_ROW, 3] = np.inf
                yield x, y, w

        patch.setattr(base, "micro_batches", poisoned)
        patch.setattr(job, "make_train_step", lambda *a, **k: STEPS.append(made := make_train_step(*a, **k)) or made)
        patch.setattr(base, "greedy_sampler", lambda *args: lambda params: [])  # not what is tested here
        assert toy_runs.start("base", "--demo", run_name="r", **toy_runs.FLAGS) == 0
        yield checkpoint.run_dir("r")


def test_a_nan_is_found_in_its_row(run, capsys):
    assert anomalies.steps(run) == [BAD_STEP]
    skip = next(r for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "skip")
    assert skip["step"] == BAD_STEP and "replay r 2" not in skip["reason"]
    assert replay.main(["r", "2", "--device=cpu", "--device_batch_size=4"]) == 0
    shown = capsys.readouterr().out
    assert f"step {BAD_STEP} was skipped" in shown and "h/0/attn/c_q/kernel" in shown
    worst = re.search(r"^row (\d+): loss (\S+)", shown, re.MULTILINE)
    assert worst and int(worst[1]) == BAD_ROW
    assert "1 of them not finite" in shown


def test_a_step_is_reproduced(run):
    """The honest batch, with the same parameters: the numbers that the training step itself gives."""
    incident = replay.open_incident(str(run))
    weights = np.where(np.isfinite(incident.weights), incident.weights, 0.5)
    honest = replay.Incident(incident.folder, incident.facts, incident.inputs, incident.targets, weights)
    result = replay.replay(honest, replay.ReplaySettings(device_batch_size=4))
    config = checkpoint.config_from_dict(incident.facts["meta"]["config"])
    mesh = sharding.make_mesh()
    params = checkpoint.load_tree(incident.folder / "params", {"params": on_one_device(abstract(config))})["params"]
    optimizer = make_optimizer(OptimHyper(), 4, config.n_embd)
    batch = [a.reshape(2, 8, -1) for a in (honest.inputs, honest.targets, honest.weights)]
    _, numbers = STEPS[0](state_of(config, params, optimizer, mesh), *batch, np.full(2, np.inf, np.float32))
    assert result.loss == pytest.approx(float(numbers["loss"]), rel=1e-5)
    assert result.grad_norm == pytest.approx(float(numbers["grad_norm"]), rel=1e-4)
    squares = math.sqrt(sum(norm**2 for norm in result.parameter_norms.values()))
    assert squares == pytest.approx(result.grad_norm, rel=1e-5)
    without = replay.replay(honest, replay.ReplaySettings(device_batch_size=4, gradients=False))
    assert without.loss == pytest.approx(result.loss, rel=1e-5) and without.grad_norm is None


def test_the_skipped_step_changed_nothing_that_counts(run):
    """Parameters kept with the incident are those of before the step; the run went on from them."""
    facts = json.loads((anomalies.folder(run, BAD_STEP) / "incident.json").read_text())
    assert facts["loss"] in ("nan", "inf") and facts["params"] == f"{BAD_STEP:08d}"
    assert facts["meta"]["stage"] == "base" and facts["meta"]["normalize"] is True
    assert [r["step"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "train"] == [0, 1, 3]
    _, params, _, _ = checkpoint.load_model("r")
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))


def test_mistakes(run, capsys):
    assert replay.main(["r", "3"]) == 1
    assert "skipped and kept are 2" in capsys.readouterr().err
    assert replay.main([]) == 2
    assert replay.main(["nowhere"]) == 1
    assert "no step of" in capsys.readouterr().err
