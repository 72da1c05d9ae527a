"""Runs that earlier code wrote still load and resume: tests/golden/run_before."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.stages import base, mid, pipeline, rl, sft
from tests import toy_runs

BEFORE = Path(__file__).parents[1] / "golden" / "run_before"
STAGES: dict[str, Any] = {"base": base, "mid": mid, "sft": sft, "rl": rl}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(BEFORE / "runs" / "before" / "tokenizer.json", tmp_path / "tokenizer")
    return checkpoint.run_dir("before")


def test_its_parameters_load(run):
    meta = checkpoint.load_meta(run)
    params = checkpoint.load_params(run, meta)
    assert (meta["stage"], meta["step"], meta["config"]["n_embd"]) == ("base", 2, 8)
    shape = params["wte"]["embedding"].shape
    assert shape == (meta["config"]["vocab_size"], 8)
    assert np.isfinite(np.asarray(params["wte"]["embedding"])).all()
    assert pipeline.find_parent("before", ("base",), step=2).tokenizer.hash == meta["tokenizer_hash"]


@pytest.mark.slow
def test_it_resumes_with_the_same_numbers(run, tmp_path, monkeypatch, capsys):
    wide = GPTConfig.from_depth  # a width of 64 would make the files large

    def narrow(depth: int, vocab_size: int, sequence_len: int, recipe: str) -> GPTConfig:
        return dataclasses.replace(wide(depth, vocab_size, sequence_len, recipe), n_embd=8, n_head=1, n_kv_head=1)

    monkeypatch.setattr(GPTConfig, "from_depth", narrow)
    monkeypatch.setattr(base, "greedy_sampler", lambda *args: lambda params: [])  # not what is tested here
    recorded = checkpoint.load_meta(run)["settings"]
    flags = {k: v for k, v in recorded.items() if k not in ("data", "device")}
    assert toy_runs.start("base", **flags, data=tmp_path / "text.jsonl") == 0
    assert "from step 2" in capsys.readouterr().out
    assert checkpoint.steps(run) == [2, 4]

    def numbers(path: Path, kind: str, *keys: str) -> np.ndarray:
        return np.array([[r[k] for k in keys] for r in metrics.read(path) if r["kind"] == kind])

    then, now = BEFORE / "runs" / "before" / "metrics.jsonl", run / "metrics.jsonl"
    for kind, *keys in (("train", "step", "loss", "grad_norm", "lr_multiplier"), ("eval", "step", "val_bpb")):
        np.testing.assert_allclose(numbers(now, kind, *keys), numbers(then, kind, *keys), rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_what_runs_record_is_what_they_recorded(stage):
    """Otherwise runs made before would be refused as started with other settings. Newer flags are not compared."""
    then = json.loads((BEFORE / "identities.json").read_text())[stage]
    defaults = STAGES[stage].DEFAULTS
    newer = {f.name for f in dataclasses.fields(defaults)} - then["settings"].keys()
    assert newer <= {
        "recipe",
        "scalar_lr",
        "warmup_steps",
        "scale_rates",
        "off",
        "every_packing",
        "fp8",
        "require_fast",
        "fused_norms",
        "profile_steps",
    }
    job: Any = SimpleNamespace(
        stage=stage,
        settings=dataclasses.replace(defaults, **then["settings"]),
        num_iterations=then["identity"]["num_iterations"],
        model_name=then["settings"].get("model_name", ""),
        identity={k: then["identity"][k] for k in ("rows", "task", "parent") if k in then["identity"]},
    )
    if stage == "rl":  # which names its parent's
        job.identity["model_name"] = job.model_name
    recorded = pipeline.recorded_settings(job)
    assert {k: v for k, v in recorded.items() if k not in newer} == then["settings"]
    identity = pipeline.identity_of(job, recorded)
    assert {k: v for k, v in identity.items() if k not in newer} == then["identity"]
