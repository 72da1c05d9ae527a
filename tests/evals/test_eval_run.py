"""scripts.eval: which model, which tasks, what is kept, what is made again, and going on after an interruption."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.data.loader import val_batches
from nanochat_jax.evals import core, evaluator, results, run
from nanochat_jax.evals.core_bundle import open_bundle
from nanochat_jax.evals.settings import EvalSettings
from nanochat_jax.model import gpt
from nanochat_jax.runs import checkpoint
from tests.golden_models import golden_model
from tests.tokenizer_fixtures import golden_tokenizer

QUICK = ["--device=cpu", "--max_problems=3", "--max_new_tokens=5"]


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Saves the golden model as a run of the demo."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")

    def make(name: str, stage: str, step: int = 10, demo: bool = True):
        config, params = golden_model()
        folder = checkpoint.run_dir(name)
        folder.mkdir(parents=True, exist_ok=True)
        golden_tokenizer().save(folder)
        meta = {"stage": stage, "config": checkpoint.config_to_dict(config), "settings": {"demo": demo}}
        checkpoint.save(folder, step, {"params": params}, {**meta, "tokenizer_hash": golden_tokenizer().hash})
        return folder

    return make


def refuse(*args, **kwargs):
    raise AssertionError("this was to be kept, not made again")


def test_names_and_defaults():
    assert run.task_names("arc-easy | GSM8K|core,BPB||GSM8K") == ["ARC-Easy", "GSM8K", "CORE", "bpb"]
    assert run.task_names("") == []
    with pytest.raises(ValueError, match="'GSM8' .* GSM8K"):
        run.task_names("ARC-Easy|GSM8")
    assert run.default_tasks("base", False) == ("CORE", "bpb", "samples")
    assert run.default_tasks("sft", False) == tuple(results.CHAT_BASELINES)
    assert "CORE" not in run.default_tasks("base", True)
    assert all(name.startswith("world/") for name in run.default_tasks("rl", True))


def test_chat_tasks_are_kept_and_made_again_only_when_asked(make_run, monkeypatch, capsys):
    folder = make_run("d2-sft", "sft")
    flags = ["--source=sft", "--tasks=world/choice|world/spelling", *QUICK]
    assert run.main(flags) == 0
    out = capsys.readouterr().out
    assert "| world/choice" in out and "SFT" in out
    kept = results.load(folder)
    assert set(kept) == {"world/choice", "world/spelling"}
    spelling = kept["world/spelling"]
    assert (spelling["stage"], spelling["step"], spelling["n"], spelling["kind"]) == ("sft", 10, 3, "generative")
    assert spelling["settings"]["max_new_tokens"] == 5 and spelling["settings"]["data"]
    assert kept["world/choice"]["baseline"] == 0.25 and len(kept["world/choice"]["items"]) == 3

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "evaluate", refuse)
        assert run.main(flags) == 0
        assert "(saved " in capsys.readouterr().out
        for changed in (["--again"], ["--max_problems=2"]):
            with pytest.raises(AssertionError, match="not made again"):
                run.main([*flags, *changed])
        # a sampling flag matters to open questions only
        assert run.main(["--tasks=world/choice", *QUICK, "--temperature=1"]) == 0
        with pytest.raises(AssertionError, match="not made again"):
            run.main(["--tasks=world/spelling", *QUICK, "--temperature=1"])
    assert results.load(folder) == kept


def test_where_nothing_can_be_saved_that_is_said_first_and_the_score_is_shown(make_run, monkeypatch, capsys):
    make_run("d2-sft", "sft")
    flags = ["--source=sft", "--tasks=world/choice", *QUICK]
    full = OSError(errno.ENOSPC, "No space left on device")
    for target, error in [("paths.tempfile.TemporaryFile", None), ("results.paths.write_atomic", full)]:
        with monkeypatch.context() as patch:
            patch.setattr(f"nanochat_jax.evals.run.{target}", lambda *a, e=error, **k: raise_(e or READ_ONLY))
            if error is None:
                patch.setattr("nanochat_jax.evals.results.paths.write_atomic", lambda *a: raise_(READ_ONLY))
            assert run.main(flags) == 1
        out, err = capsys.readouterr()
        said, score, table = (out.find(words) for words in ("printed only", "world/choice: 0.", "| world/choice"))
        assert min(said, score, table) > 0 and max(said, score) < table and (said < score) == (error is None)
        assert "not all results were saved" in err and (error or READ_ONLY).strerror in err
    assert results.load(checkpoint.run_dir("d2-sft")) == {}


READ_ONLY = OSError(errno.EROFS, "Read-only file system")


def raise_(error):
    raise error


def slow_bits(stage, name, eval_tokens):
    """Bits per byte of the same rows, from whole logits and the text of every counted target."""
    settings = EvalSettings(eval_tokens=eval_tokens)
    config, params = golden_model()
    rows = evaluator.Evaluator(config, params, golden_tokenizer(), stage, settings, {"demo": True}).rows(name)
    nats, n_bytes = 0.0, 0
    for inputs, targets, weights in val_batches(rows, 8):
        logits = np.asarray(gpt.forward(config, params, jnp.asarray(inputs)), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, column in np.argwhere((weights > 0) & (targets >= 0)):
            token = int(targets[row, column])
            if golden_tokenizer().decode([token]) not in golden_tokenizer().special_tokens:
                nats -= logits[row, column, token]
                n_bytes += len(golden_tokenizer().decode_bytes([token]))
    return nats / n_bytes / np.log(2)


@pytest.mark.slow
def test_base_model_bits_and_samples(make_run, capsys):
    folder = make_run("d2-base", "base")
    assert run.main(["--source=base", "--eval_tokens=4096", "--device=cpu"]) == 0
    kept = results.load(folder)
    assert set(kept) == {"bpb", "samples"}
    assert kept["bpb"]["bpb"] == pytest.approx(slow_bits("base", "bpb", 4096), rel=1e-4)
    assert kept["bpb"]["tokens"] == 4096
    assert [item["prompt"] for item in kept["samples"]["items"]][0] == "The capital of France is"
    assert "| bpb" in capsys.readouterr().out
    make_run("d2-sft", "sft")
    assert run.main(["--source=sft", "--tasks=chat-bpb|samples", "--eval_tokens=1024", "--device=cpu"]) == 0
    kept = results.load(checkpoint.run_dir("d2-sft"))
    assert kept["chat-bpb"]["bpb"] == pytest.approx(slow_bits("sft", "chat-bpb", 1024), rel=1e-4)
    assert kept["samples"]["items"][1]["prompt"] == "Who are you?"


def bundle(folder, n=14):
    """A CORE bundle of two tasks."""
    yaml = "icl_tasks:\n"
    for label, kind, shots in (("birds", "multiple_choice", 2), ("ends", "language_modeling", 0)):
        yaml += f"- {{label: {label}, dataset_uri: {label}.jsonl, num_fewshot: [{shots}], icl_task_type: {kind}}}\n"
    birds = [{"query": f"Bird {i}?", "choices": ["gull", "boat"], "gold": i % 2} for i in range(n)]
    ends = [{"context": f"{i} and", "continuation": "then"} for i in range(n)]
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text(yaml)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nbirds,50\nends,0\n")
    for name, items in (("birds", birds), ("ends", ends)):
        (folder / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_core_resumes_after_an_interruption(make_run, tmp_path, monkeypatch, capsys):
    folder = make_run("d2-base", "base")
    flags = ["--tasks=CORE", "--device=cpu", f"--eval_bundle={bundle(tmp_path / 'bundle')}"]
    evaluate_task, calls = core.evaluate_task, []

    def interrupted(scorer, tokenizer, task, *arguments, **more):
        calls.append(task.label)
        if task.label == "ends" and len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_task(scorer, tokenizer, task, *arguments, **more)

    monkeypatch.setattr(core, "evaluate_task", interrupted)
    assert run.main(flags) == 130
    partial = results.load(folder)["CORE"]
    assert partial["skipped"].startswith("1 of 2 tasks") and list(partial["tasks"]) == ["birds"]
    assert run.main(flags) == 0
    assert calls == ["birds", "ends", "ends"]
    whole = results.load(folder)["CORE"]
    assert "skipped" not in whole and whole["n"] == 28
    parts = whole["tasks"].values()
    assert whole["centered"] == pytest.approx(np.mean([part["centered"] for part in parts]))
    assert whole["interval"][0] <= whole["centered"] <= whole["interval"][1]
    config, params, tokenizer, _ = checkpoint.load_model("d2-base")
    at_once = core.evaluate_core(core.Scorer(config, params), tokenizer, open_bundle(tmp_path / "bundle"))
    assert whole["centered"] == pytest.approx(at_once["centered"]) and whole["interval"] == at_once["interval"]
    assert {k: v["items"] for k, v in at_once["tasks"].items()} == {k: v["items"] for k, v in whole["tasks"].items()}
    capsys.readouterr()
    assert run.main([*flags, "--max_per_task=2"]) == 1
    assert "--max_per_task=2 " in capsys.readouterr().err
    assert results.load(folder)["CORE"] == whole


def test_parameters_can_be_swapped_in_the_middle_of_training():
    config, params = golden_model()
    names = ["world/choice", "world/facts"]
    settings = EvalSettings(max_problems=6, max_new_tokens=4)
    mine = evaluator.Evaluator(config, params, golden_tokenizer(), "sft", settings, {"demo": True})
    mine.prepare(names)
    first = [mine.evaluate(name)["items"] for name in names]
    mine.params = {**params, "lm_head": jax.tree.map(lambda x: -x, params["lm_head"])}
    other = [mine.evaluate(name)["items"] for name in names]
    assert all(a != b for a, b in zip(first, other, strict=True))
    mine.params = params
    assert [mine.evaluate(name)["items"] for name in names] == first


@pytest.mark.parametrize("strict", [False, True])
def test_answers_are_judged_strictly_where_asked_for(strict, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "6 * 7?", "answer": "#### 42"}) + "\n")
    config, params = golden_model()
    settings = EvalSettings(task_data=tmp_path, strict=strict)
    mine = evaluator.Evaluator(config, params, golden_tokenizer(), "sft", settings)
    task = mine.task("GSM8K")
    assert task.evaluate(task[0], "#### 42") and task.evaluate(task[0], "#### $42.") is not strict
    assert ("strict" in mine.settings_of("GSM8K")["judge"]) is strict


def test_errors_name_the_remedy(make_run, tmp_path, capsys):
    assert run.main(["--device=cpu"]) == 1
    assert "no trained model" in capsys.readouterr().err
    make_run("d2-base", "base", demo=False)
    for flags, message in [
        (["--tasks=nothing"], "--tasks: 'nothing'"),
        (["--source=sft", "--run_name=d2-base"], "--source=sft"),
        (["--step=7"], "step 7"),
        (["--tasks=CORE", f"--eval_bundle={tmp_path / 'none'}"], "none"),
        (["--tasks=GSM8K", f"--task_data={tmp_path}"], "gsm8k/test"),
        (["--tasks=bpb"], "--data=PATH"),
        (["--tasks=world/choice", "--max_problems=0"], "max_problems"),
    ]:
        assert run.main(["--device=cpu", *flags]) == 1, flags
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--sorce=sft"])
