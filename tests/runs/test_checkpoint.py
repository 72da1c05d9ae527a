"""Checkpoints: round trips, atomicity, damage, foreign tokenizers, full disks."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, abstract
from nanochat_jax.report import list_runs
from nanochat_jax.runs import checkpoint
from nanochat_jax.runs.checkpoint import CheckpointError
from nanochat_jax.text.tokenizer import Tokenizer
from tests.toy_params import on_one_device, toy_params
from tests.toy_runs import saved_run, small_tokenizer

CONFIG = GPTConfig(sequence_len=16, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def save(step: int, state=None, **how) -> None:
    meta = {"stage": "base", "config": checkpoint.config_to_dict(CONFIG), "tokenizer_hash": small_tokenizer().hash}
    checkpoint.save(checkpoint.run_dir("r"), step, state or {"params": toy_params(CONFIG, step)}, meta, **how)


def run_of(*steps: int) -> Path:
    return saved_run("r", small_tokenizer(), CONFIG, steps=steps)


def files_of(run: Path, step: int) -> list[Path]:
    """What a checkpoint consists of, but for the tiniest; the smallest first."""
    found = [p for p in (checkpoint.step_dir(run, step) / "state").rglob("*") if p.is_file() and p.stat().st_size > 100]
    return sorted(found, key=lambda p: p.stat().st_size)


def test_round_trip_is_exact_and_partial_reading_works(base):
    run, expected = run_of(3), toy_params(CONFIG, 3)
    got = checkpoint.restore(run, 3, {"params": on_one_device(abstract(CONFIG))})["params"]
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    config, params, loaded, info = checkpoint.load_model()
    assert (config, loaded.hash) == (CONFIG, small_tokenizer().hash)
    assert (info["stage"], info["run"]) == ("base", "r")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("keep_every, kept", [(0, [6, 7]), (3, [3, 6, 7])])
def test_only_the_newest_are_kept_and_some_for_good(base, keep_every, kept):
    for step in range(1, 8):
        save(step, {"w": np.zeros(2)}, keep=2, keep_every=keep_every)
    assert checkpoint.steps(checkpoint.run_dir("r")) == kept


def test_unfinished_saves_are_never_seen_and_are_cleaned_up(base):
    run = run_of(1)
    complete = checkpoint.step_dir(run, 1)
    shutil.copytree(complete, complete.with_name(".00000002.writing"))  # killed just before the rename
    (run / "checkpoints" / "00000003").mkdir()  # a folder without meta.json
    shutil.copytree(complete, complete.with_name(".00000000.removing"))  # killed while an old one was removed
    assert checkpoint.steps(run) == [1]
    save(4)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_failing_save_names_the_last_good_one_and_leaves_it(base, monkeypatch):
    run = run_of(1)

    def full(path, tree):
        Path(path).mkdir(parents=True)
        (Path(path) / "half").write_bytes(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_async", full)
    with pytest.raises(CheckpointError, match=r"No space left.*00000001"):
        save(2)
    assert checkpoint.steps(run) == [1] and not list((run / "checkpoints").glob(".*"))


def test_too_little_space_is_noticed_before_writing(base, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # pyright: ignore
    with pytest.raises(CheckpointError, match="free"):
        save(2)


def test_damage_is_found_and_the_previous_checkpoint_offered(base):
    """One bit, too, which only a checksum sees. Loading the parameters alone looks at every file."""
    run = run_of(1, 2)
    for victim in (files_of(run, 2)[0], files_of(run, 2)[-1]):
        good = victim.read_bytes()
        for bad in (good[:-7], good[:-7] + bytes([good[-7] ^ 4]) + good[-6:]):
            victim.write_bytes(bad)
            with pytest.raises(CheckpointError, match=rf"{victim.name} .*damaged.*step 1"):
                checkpoint.load_model("r")
        victim.write_bytes(good)
    checkpoint.load_model("r")


def test_checkpoints_from_before_checksums_are_read(base):
    run = run_of(1)
    path = checkpoint.step_dir(run, 1) / "meta.json"
    saved = json.loads(path.read_text())
    saved["files"] = {name: facts["size"] for name, facts in saved["files"].items()}
    path.write_text(json.dumps(saved))
    checkpoint.load_model("r")


def test_foreign_tokenizer_is_refused_by_both_hashes(base):
    run = run_of(1)
    other = Tokenizer.train(["entirely different words here"] * 4, 268)
    other.save(run)
    with pytest.raises(CheckpointError, match=f"{other.hash[:12]}.*{small_tokenizer().hash[:12]}"):
        checkpoint.load_model("r")


def test_missing_runs_say_what_to_do(base):
    with pytest.raises(CheckpointError, match="speedrun_jax.sh"):
        checkpoint.load_model()
    saved_run("mine", small_tokenizer(), CONFIG)
    with pytest.raises(CheckpointError, match="mine"):
        checkpoint.load_model("other")
    with pytest.raises(CheckpointError, match="sft"):
        checkpoint.load_model(stage="sft")
    with pytest.raises(ValueError, match="evil"):
        checkpoint.run_dir("../evil")


@pytest.mark.parametrize("name", ["a copy", "a (1)", "ä", "a+b", "-", "..."])
def test_a_folder_that_can_be_no_run_is_left_out_and_named_once(base, name, caplog):
    run = saved_run("mine", small_tokenizer(), CONFIG)
    shutil.copytree(run, run.with_name(name))
    os.utime(checkpoint.step_dir(run.with_name(name), 1) / "meta.json", (4e9, 4e9))
    usable = name in ("-",)
    for _ in range(2):
        assert [p.name for p in checkpoint.run_folders()] == (["-"] if usable else []) + ["mine"]
    assert checkpoint.find_run().name == checkpoint.find_run(stage="base").name == ("-" if usable else "mine")
    _, _, _, meta = checkpoint.load_model()
    assert checkpoint.chosen(meta, None, None)[1] == "" or usable
    assert [m.run for m in list_runs.models()] == (["mine", "-"] if usable else ["mine"])
    assert caplog.text.count("left out") == (0 if usable or name.startswith(".") else 1)


def test_a_run_is_trained_by_one_process_at_a_time(base):
    run = checkpoint.run_dir("r")
    with checkpoint.exclusive(run):
        with pytest.raises(CheckpointError, match="--run_name"):
            with checkpoint.exclusive(run):
                pass
    with checkpoint.exclusive(run):
        pass


def test_wrong_shape_and_unknown_config_fields_are_errors(base):
    run = run_of(1)
    wrong = jax.tree.map(lambda a: jax.ShapeDtypeStruct((7, *a.shape[1:]), a.dtype), abstract(CONFIG))
    with pytest.raises(CheckpointError, match="00000001"):
        checkpoint.restore(run, 1, {"params": on_one_device(wrong)})
    path = checkpoint.step_dir(run, 1) / "meta.json"
    saved = json.loads(path.read_text())
    saved["config"]["flux_capacitor"] = 1
    path.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="flux_capacitor"):
        checkpoint.load_model("r")
