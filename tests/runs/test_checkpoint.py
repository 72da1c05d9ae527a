"""Checkpoints: round trips, atomicity, damage, foreign tokenizers, full disks."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, abstract
from nanochat_jax.runs import checkpoint
from nanochat_jax.runs.checkpoint import CheckpointError
from nanochat_jax.text.tokenizer import Tokenizer
from tests.toy_params import toy_params

CONFIG = GPTConfig(sequence_len=16, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat and the bat"] * 4, 270)


def state(seed: int = 0):
    return {"params": toy_params(CONFIG, seed), "step": jnp.int32(seed)}


def meta(tokenizer, **extra):
    return {
        "stage": "base",
        "config": checkpoint.config_to_dict(CONFIG),
        "tokenizer_hash": tokenizer.hash,
        "evaluated": True,
        **extra,
    }


def saved_run(tokenizer, name="r", steps=(1,)):
    run = checkpoint.run_dir(name)
    run.mkdir(parents=True)
    tokenizer.save(run)
    for step in steps:
        checkpoint.save(run, step, state(step), meta(tokenizer))
    return run


def target():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), abstract(CONFIG))


def test_round_trip_is_exact_and_partial_reading_works(base, tokenizer):
    run = saved_run(tokenizer, steps=(3,))
    got = checkpoint.restore(run, 3, {"params": target()})["params"]
    jax.tree.map(np.testing.assert_array_equal, got, state(3)["params"])
    config, params, loaded, info = checkpoint.load_model()
    assert config == CONFIG and loaded.hash == tokenizer.hash and info["stage"] == "base" and info["run"] == "r"
    jax.tree.map(np.testing.assert_array_equal, params, state(3)["params"])


def test_only_the_newest_are_kept(base, tokenizer):
    run = saved_run(tokenizer, steps=(1, 2, 3, 4))
    assert checkpoint.steps(run) == [3, 4]


def test_every_so_many_steps_one_stays_for_good(base, tokenizer):
    run = checkpoint.run_dir("r")
    for step in range(1, 8):
        checkpoint.save(run, step, {"w": np.zeros(2)}, meta(tokenizer), keep=2, keep_every=3)
    assert checkpoint.steps(run) == [3, 6, 7]


def test_unfinished_saves_are_never_seen_and_are_cleaned_up(base, tokenizer):
    run = saved_run(tokenizer, steps=(1,))
    complete = checkpoint.step_dir(run, 1)
    shutil.copytree(complete, complete.with_name(".00000002.writing"))  # killed just before the rename
    (run / "checkpoints" / "00000003").mkdir()  # a folder without meta.json
    shutil.copytree(complete, complete.with_name(".00000000.removing"))  # killed while an old one was removed
    assert checkpoint.steps(run) == [1]
    checkpoint.save(run, 4, state(4), meta(tokenizer))
    assert not list((run / "checkpoints").glob(".*"))


def test_a_failing_save_names_the_last_good_one_and_leaves_it(base, tokenizer, monkeypatch):
    run = saved_run(tokenizer, steps=(1,))

    def full(path, tree):
        Path(path).mkdir(parents=True)
        (Path(path) / "half").write_bytes(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_async", full)
    with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is .*00000001"):
        checkpoint.save(run, 2, state(2), meta(tokenizer))
    assert checkpoint.steps(run) == [1] and not list((run / "checkpoints").glob(".*"))
    monkeypatch.undo()


def test_too_little_space_is_noticed_before_writing(base, tokenizer, monkeypatch):
    run = saved_run(tokenizer, steps=(1,))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # pyright: ignore
    with pytest.raises(CheckpointError, match="free"):
        checkpoint.save(run, 2, state(2), meta(tokenizer))


def test_damage_is_found_and_the_previous_checkpoint_offered(base, tokenizer):
    run = saved_run(tokenizer, steps=(1, 2))
    victim = max(
        (p for p in (checkpoint.step_dir(run, 2) / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"damaged.*previous checkpoint is step 1"):
        checkpoint.load_meta(run)


def test_a_single_changed_bit_is_found(base, tokenizer):
    """Same size, one bit: only a checksum sees it. Loading the parameters alone looks at every file, too."""
    run = saved_run(tokenizer, steps=(1, 2))
    files = [p for p in (checkpoint.step_dir(run, 2) / "state").rglob("*") if p.is_file() and p.stat().st_size > 100]
    for victim in (min(files, key=lambda p: p.stat().st_size), max(files, key=lambda p: p.stat().st_size)):
        good = victim.read_bytes()
        victim.write_bytes(good[:50] + bytes([good[50] ^ 4]) + good[51:])
        with pytest.raises(
            CheckpointError, match=rf"{victim.name} is missing or damaged.*previous checkpoint is step 1"
        ):
            checkpoint.load_model("r")
        victim.write_bytes(good)
    checkpoint.load_model("r")


def test_checkpoints_from_before_checksums_are_read(base, tokenizer):
    run = saved_run(tokenizer, steps=(1,))
    path = checkpoint.step_dir(run, 1) / "meta.json"
    saved = json.loads(path.read_text())
    saved["files"] = {name: facts["size"] for name, facts in saved["files"].items()}
    path.write_text(json.dumps(saved))
    checkpoint.load_model("r")


def test_foreign_tokenizer_is_refused_by_both_hashes(base, tokenizer):
    run = saved_run(tokenizer)
    other = Tokenizer.train(["entirely different words here"] * 4, 268)
    other.save(run)
    with pytest.raises(CheckpointError, match=f"{other.hash[:12]}.*{tokenizer.hash[:12]}"):
        checkpoint.load_model("r")


def test_missing_runs_say_what_to_do(base, tokenizer):
    with pytest.raises(CheckpointError, match="speedrun_jax.sh"):
        checkpoint.load_model()
    saved_run(tokenizer, "mine")
    with pytest.raises(CheckpointError, match="runs there: mine"):
        checkpoint.load_model("other")
    with pytest.raises(CheckpointError, match="no trained sft model"):
        checkpoint.load_model(stage="sft")
    with pytest.raises(ValueError, match="letters"):
        checkpoint.run_dir("../evil")


def test_a_run_is_trained_by_one_process_at_a_time(base):
    run = checkpoint.run_dir("r")
    with checkpoint.exclusive(run):
        with pytest.raises(CheckpointError, match="another process.*--run_name"):
            with checkpoint.exclusive(run):
                pass
    with checkpoint.exclusive(run):
        pass


def test_wrong_shape_and_unknown_config_fields_are_errors(base, tokenizer):
    run = saved_run(tokenizer)
    wrong = jax.tree.map(lambda a: jax.ShapeDtypeStruct((7, *a.shape[1:]), a.dtype, sharding=a.sharding), target())
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.restore(run, 1, {"params": wrong})
    path = checkpoint.step_dir(run, 1) / "meta.json"
    saved = json.loads(path.read_text())
    saved["config"]["flux_capacitor"] = 1
    path.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="flux_capacitor"):
        checkpoint.load_model("r")
