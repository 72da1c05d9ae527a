"""The modern recipe from pretraining to reinforcement learning: what a stage takes from its parent, what is off."""

import shutil

import jax
import numpy as np
import pytest

from nanochat_jax.data.row_store import RowSet
from nanochat_jax.model.config import MODERN
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages import base, mixtures, sft
from nanochat_jax.stages.main import inherited_settings
from nanochat_jax.training.optim import MUON_PARTS
from nanochat_jax.utils.paths import rows_dir
from tests import toy_runs

FLAGS = toy_runs.FLAGS | dict(depth=2, total_batch_size=1536, num_iterations=3, eval_tokens=384)
CHAT = dict(device_batch_size=1, num_iterations=2, eval_tokens=384, metrics_max_problems=4)
RL = dict(num_iterations=1, examples_per_step=2, num_samples=4, max_new_tokens=8, slots=4, eval_examples=2)
RL |= dict(eval_samples=2, device_batch_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base directory with the modern run `m-base`; to be copied, not to be used."""
    folder = tmp_path_factory.mktemp("modern")
    with pytest.MonkeyPatch.context() as patch:
        toy_runs.use(folder, patch, samples=False)
        flags = FLAGS | dict(run_name="m-base", embedding_lr=0.25)
        assert toy_runs.start("base", "--demo", recipe="modern", **flags) == 0
    return folder


@pytest.fixture
def home(folder, tmp_path, monkeypatch):
    toy_runs.use(shutil.copytree(folder, tmp_path / "home"), monkeypatch, samples=False)


def meta_of(run):
    return checkpoint.load_meta(checkpoint.run_dir(run))


def test_a_base_run_has_all_parts(home):
    meta = meta_of("m-base")
    config = checkpoint.config_from_dict(meta["config"])
    assert set(config.parts) == set(MODERN) and config.bos_id == toy_runs.toy_tokenizer().bos_id
    assert not config.smear_across_documents
    rows = [RowSet.open(path, toy_runs.toy_tokenizer()) for path in rows_dir().glob("best_fit-train-*")]
    assert len(rows) == 1 and rows[0][0][0] == toy_runs.toy_tokenizer().bos_id and "cropped" in rows[0].manifest
    assert meta["settings"]["grad_clip"] == 0 and meta["settings"]["warmup_steps"] == 40


def test_later_stages_take_recipe_batch_rates_and_moments_from_the_base_run(home, capsys):
    assert toy_runs.start("sft", "--demo", source="m-base", **CHAT) == 0
    meta = meta_of("m-sft")
    settings = meta["settings"]
    assert settings["recipe"] == "modern" and settings["total_batch_size"] == 1536
    assert (settings["embedding_lr"], settings["init_lr_frac"], settings["weight_decay"]) == (0.25, 0.8, 0)
    saved = checkpoint.load_tree(checkpoint.step_dir(checkpoint.run_dir("m-sft"), 2) / "state", None)
    assert saved["opt_state"]["adam"]["count"] == 3 + 2 and saved["opt_state"]["muon"]["count"] == 2
    assert toy_runs.start("sft", "--demo", source="m-base", **CHAT) == 0, "a finished run has nothing to do"
    assert toy_runs.start("rl", "--demo", source="m-sft", **RL) == 0
    settings = meta_of("m-rl")["settings"]
    assert (settings["recipe"], settings["embedding_lr"], settings["grad_clip"]) == ("modern", 0.2, 0)


@pytest.mark.parametrize(
    ("stage", "flags", "named"),
    [
        ("sft", dict(recipe="v1", source="m-base"), "--recipe=v1"),
        ("mid", dict(source="m-base"), "--stage=sft"),
        ("base", dict(off="smear"), "--off"),
        ("base", dict(recipe="modern", off="smear,rope"), "--off=rope"),
        ("base", dict(recipe="v2"), "--recipe"),
    ],
)
def test_what_does_not_fit_is_refused(home, capsys, stage, flags, named):
    try:
        code = toy_runs.start(stage, "--demo", run_name="new", **flags)
    except SystemExit as error:
        code = error.code
    assert code in (1, 2) and named in capsys.readouterr().err


def test_parts_can_be_left_out(home):
    settings = base.BaseSettings(recipe="modern", depth=2, num_iterations=2, total_batch_size=2048, device_batch_size=1)
    for part in base.PARTS:
        plan = base.plan_of(base.dataclasses.replace(settings, off=part), 500, 1)
        left_out = {name for name in MODERN if name not in plan.config.parts}
        left_out |= {name for name in MUON_PARTS if not getattr(plan.hyper, name)}
        assert left_out == {part} - {"best_fit"}
    assert base.packing_of("modern", "smear, best_fit") == base.packing_of("v1") == "stream"
    assert base.packing_of("modern", "smear") == "best_fit"


def test_the_mixture_of_finetuning(monkeypatch):
    """SmolTalk once, MMLU three times, GSM8K four times; names only where one is given."""
    monkeypatch.setattr(mixtures.tasks, "load", lambda name, split, folder, **options: (name, split, options))
    monkeypatch.setattr(mixtures, "TaskMixture", list)
    monkeypatch.setattr(mixtures, "identity_task", lambda name: name)
    parent = type("Parent", (), {"model_name": "nanochat"})
    train, val = mixtures.sft(sft.SftSettings(recipe="modern"), parent, None)
    mmlu, gsm8k = ("MMLU", "auxiliary_train", {}), ("GSM8K", "train", {})
    assert train == [("SmolTalk", "train", {}), *[mmlu] * 3, *[gsm8k] * 4]
    assert val == [("SmolTalk", "test", {}), ("MMLU", "test", {"stop": 5200}), ("GSM8K", "test", {"stop": 420})]
    assert mixtures.sft(sft.SftSettings(recipe="modern", model_name="Ada"), parent, None)[0][-2:] == ["Ada"] * 2


def test_defaults_come_from_the_run_that_is_resumed_or_begun_from(home):
    assert inherited_settings(["--source=m-base"], ("base",))["recipe"] == "modern"
    assert inherited_settings(["--run_name", "m-base"], ())["recipe"] == "modern"
    assert inherited_settings(["--source=nothing"], ("base",)) == {} == inherited_settings([], ())
    given = {"total_batch_size": 4096, "matrix_lr": 0.03, "recipe": "modern"}
    settings = sft.defaults(False, given)
    assert (settings.total_batch_size, settings.matrix_lr, settings.recipe) == (4096, 0.03, "modern")
    assert base.defaults(False, {}).target_param_data_ratio == 12
    jax.tree.map(np.testing.assert_equal, base.defaults(True, {}).scale_rates, False)
