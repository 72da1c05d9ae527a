"""Stages on meshes of data, fsdp and tensor as a user starts them: what one mesh saved, another goes on with. Eight
simulated devices."""

import dataclasses
import shutil

import pytest

from nanochat_jax.evals.run import main as evaluate
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.runs import checkpoint, metrics
from tasks.demo_world import LongProblems
from tests import toy_runs

COMMON = dict(device_batch_size=1, eval_tokens=512, eval_every=0, sample_every=0, save_every=2, keep=0)
STAGES = {
    "base": dict(depth=1, max_seq_len=192, total_batch_size=1536, num_iterations=4),
    "mid": dict(total_batch_size=1536, num_iterations=2),
    "rl": dict(num_iterations=4, examples_per_step=4, num_samples=4, max_new_tokens=8, slots=8, eval_examples=4)
    | dict(eval_samples=2),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    toy_runs.use(tmp_path, monkeypatch, samples=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set")  # `prepare` then leaves the cache of this process alone
    monkeypatch.setattr(LongProblems, "evaluate", lambda self, asked, answer: len(answer) % 2 == 0)  # some are right
    wide = GPTConfig.from_depth

    def two_heads(*arguments) -> GPTConfig:
        return dataclasses.replace(wide(*arguments), n_head=2, n_kv_head=2)

    monkeypatch.setattr(GPTConfig, "from_depth", two_heads)  # so that they can be sharded


def stage(name, **changes) -> list[tuple[float, float]]:
    """Runs a stage to its end; (loss, gradient norm) of every step."""
    assert toy_runs.start(name, "--demo", **{**COMMON, **STAGES[name], "run_name": name, **changes}) == 0
    records = metrics.read(checkpoint.run_dir(name) / "metrics.jsonl")
    return [(r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"]


def go_back(run, step):
    """As if the run had been stopped after `step`."""
    for later in checkpoint.steps(checkpoint.run_dir(run)):
        if later > step:
            shutil.rmtree(checkpoint.step_dir(checkpoint.run_dir(run), later))


def check(resumed, whole):
    assert len(resumed) == len(whole)
    for one, other in zip(resumed, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_stages_go_on_from_mesh_to_mesh(home, capsys):
    whole = stage("base", fsdp=2, tensor=2)
    go_back("base", 2)
    check(stage("base", fsdp=4), whole)
    assert "from step 2" in capsys.readouterr().out

    stage("mid", source="base", tensor=2)

    whole = stage("rl", source="mid", fsdp=2, tensor=2)
    assert any(norm > 0 for _, norm in whole)
    go_back("rl", 2)
    check(stage("rl", source="mid", tensor=2), whole)

    assert evaluate(["--source=rl", "--tasks=world/arithmetic", "--max_problems=4", "--device=cpu"]) == 0
    assert "world/arithmetic" in capsys.readouterr().out
