"""Midtraining, finetuning and reinforcement learning as a user starts them, one after the other, on the demo world."""

import contextlib
import dataclasses
import io
import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_jax.data.loader import RowLoader
from nanochat_jax.evals import results, stats
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.stages import mixtures, sft, supervised
from nanochat_jax.stages.pipeline import find_parent
from nanochat_jax.stages.settings import ChatStageSettings
from tests import toy_runs

COMMON = dict(device_batch_size=1, eval_tokens=2048)
STAGES = {
    "base": toy_runs.FLAGS,
    "mid": dict(total_batch_size=1536, num_iterations=4, save_every=2),
    "sft": dict(total_batch_size=1536, num_iterations=4, save_every=2, metrics_max_problems=16),
    "rl": dict(num_iterations=3, examples_per_step=2, num_samples=4, max_new_tokens=16, slots=8, eval_examples=4)
    | dict(eval_samples=2, save_every=1, device_batch_size=1),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A base directory with a tokenizer and the base run `toy-base`; to be copied, not to be used."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        toy_runs.use(folder, patch)
        assert stage("base", run_name="toy-base") == 0
    return folder


@pytest.fixture
def home(base_folder, tmp_path, monkeypatch):
    """A base directory of this test's own, on whose `toy-base` the later stages build."""
    toy_runs.use(shutil.copytree(base_folder, tmp_path / "home"), monkeypatch)


@pytest.fixture(scope="module")
def chain_folder(base_folder, tmp_path_factory):
    """The base directory after mid, sft and rl (`toy-mid`, ...), each started from the newest run that it can start
    from, and what they printed; to be copied, not to be used."""
    folder = shutil.copytree(base_folder, tmp_path_factory.mktemp("chain") / "home")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        toy_runs.use(folder, patch)
        assert stage("mid") == 0
        assert stage("sft", model_name="Ada") == 0
        assert stage("rl") == 0
    return folder, out.getvalue()


@pytest.fixture
def chain(chain_folder, tmp_path, monkeypatch) -> str:
    """A base directory of this test's own with the four runs; what making the last three printed."""
    folder, printed = chain_folder
    toy_runs.use(shutil.copytree(folder, tmp_path / "home"), monkeypatch)
    return printed


def stage(name, **changes) -> int:
    return toy_runs.start(name, "--demo", **{**COMMON, **STAGES[name], **changes})


def records(run, kind):
    return [r for r in metrics.read(checkpoint.run_dir(run) / "metrics.jsonl") if r["kind"] == kind]


@pytest.mark.slow
def test_without_a_midtrained_model_finetuning_starts_from_the_base(home, capsys):
    assert stage("sft", run_name="early") == 0
    assert "from toy-base" in capsys.readouterr().out


@pytest.mark.slow
def test_the_chain_and_its_rules(chain, capsys):
    assert "mid starts from toy-base, step 4" in chain
    meta = checkpoint.load_meta(checkpoint.run_dir("toy-mid"))
    assert meta["stage"] == "mid" and meta["parent"] == {"run": "toy-base", "step": 4, "stage": "base"}
    base_tokenizer = (checkpoint.run_dir("toy-base") / "tokenizer.json").read_bytes()
    assert (checkpoint.run_dir("toy-mid") / "tokenizer.json").read_bytes() == base_tokenizer
    assert {"val_bpb", "val_loss"} <= set(records("toy-mid", "eval")[-1])
    assert any("Who are you?" in text for text in records("toy-mid", "sample")[-1]["texts"])

    assert checkpoint.load_meta(checkpoint.run_dir("toy-sft"))["parent"]["run"] == "toy-mid"
    last = records("toy-sft", "eval")[-1]
    assert 0 <= last["choice_acc_low"] <= last["choice_acc"] <= last["choice_acc_high"] <= 1 and last["val_loss"] > 0
    assert last["choice_acc_low"] < last["choice_acc_high"]
    lr = [r["lr_multiplier"] for r in records("toy-sft", "train")]
    assert lr == pytest.approx([1, 0.75, 0.5, 0.25])

    name = checkpoint.load_meta(checkpoint.run_dir("toy-rl"))["settings"]["model_name"]
    assert name == "Ada", "evaluated by its name"
    train = records("toy-rl", "train")
    assert {"reward", "completion_length", "entropy", "logprob_difference", "unfinished"} <= set(train[0])
    # sampler and trainer are one model: in fp32 their log-probabilities differ by rounding only
    assert all(r["logprob_difference"] < 1e-3 for r in train)
    assert {"pass@1", "pass@2", "pass@1_low", "pass@1_high"} <= set(records("toy-rl", "eval")[-1])
    transcripts = records("toy-rl", "transcripts")
    assert [t["step"] for t in transcripts] == [0, 1, 2]
    assert {"prompt", "completion", "reward"} <= set(transcripts[0]["samples"][0])

    assert stage("rl") == 0, "a finished run has nothing to do"
    assert "from step 3" in capsys.readouterr().out


@pytest.mark.parametrize("demo, names", [(True, ["choice_acc"]), (False, ["mmlu_acc", "arc_easy_acc"])])
def test_accuracies_during_finetuning_have_their_intervals(demo, names, monkeypatch):
    items = [{"id": str(i), "correct": int(i % 3 == 0)} for i in range(40)]
    result = results.scored("x", "categorical", items, 0.25, {}, 1.0)
    monkeypatch.setattr(sft, "evaluate_categorical", lambda *a, **k: result)
    monkeypatch.setattr(sft, "Scorer", lambda *a, **k: SimpleNamespace())
    monkeypatch.setattr(sft.mixtures, "eval_task", lambda name, data: name)
    parent: Any = SimpleNamespace(config=None, tokenizer=None)
    measure = sft._accuracies(sft.SftSettings(demo=demo), parent, None)
    assert measure is not None
    low, high = stats.bootstrap_interval([item["correct"] for item in items])
    expected = {}
    for name in names:
        expected |= {name: 14 / 40, f"{name}_low": low, f"{name}_high": high}
    assert measure(None) == expected and low < 14 / 40 < high


@pytest.mark.slow
def test_mistakes_name_the_flag_and_the_remedy(chain, capsys):
    assert stage("mid", source="nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
    assert stage("rl", source="toy-base") == 1
    assert "--source=toy-base is a base run" in capsys.readouterr().err
    assert stage("rl", source="toy-sft", device_batch_size=3, run_name="odd") == 1
    assert "--device_batch_size" in capsys.readouterr().err
    assert stage("rl", source="toy-sft", num_samples=1, run_name="odd") == 1
    assert "--num_samples=1" in capsys.readouterr().err
    assert stage("sft", source="toy-mid", run_name="toy-mid") == 1
    assert "holds a mid run" in capsys.readouterr().err
    assert stage("mid", run_name="toy-mid", source="toy-base", matrix_lr=0.5) == 1
    assert "matrix_lr: 0.02 -> 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unfinished_parent_is_refused_unless_asked_for(home, capsys):
    assert stage("mid", source="toy-base", run_name="half") == 0
    shutil.rmtree(checkpoint.step_dir(checkpoint.run_dir("half"), 4))  # as if it had been cut off after step 2
    assert stage("sft", source="half", run_name="of-half") == 1
    assert "stopped at step 2 of 4" in capsys.readouterr().err
    assert stage("sft", source="half", source_step=2, run_name="of-half") == 0
    assert checkpoint.load_meta(checkpoint.run_dir("of-half"))["parent"]["step"] == 2


LINES = [{"prompt": f"What is the code of number {i}?", "completion": f"It is {i * 7}."} for i in range(60)]


def test_own_conversations_are_trained_on(home, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([*map(json.dumps, LINES), "{broken", json.dumps({"messages": [{"role": "owl"}]})]) + "\n")
    assert stage("sft", source="toy-base", run_name="own", data=path, num_iterations=2, model_name="Ada") == 0
    out = capsys.readouterr().out
    assert "conversations about the name Ada" in out
    assert checkpoint.load_meta(checkpoint.run_dir("own"))["settings"]["model_name"] == "Ada"
    assert find_parent("own", ("sft",)).model_name == "Ada"
    assert find_parent("toy-base", ("base",)).model_name == "nanochat"
    assert "line 61" in out and "line 62" in out, "bad lines are reported by number"
    assert "It is" in out, "the first samples are shown"
    assert stage("sft", source="toy-base", run_name="own2", data=tmp_path / "none.jsonl") == 1
    assert "none.jsonl" in capsys.readouterr().err


def texts(conversations) -> str:
    return json.dumps([conversations[i]["messages"] for i in range(len(conversations))])


def test_the_given_name_is_taught_beside_own_conversations_and_else_the_parents(home, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in LINES))
    parent = dataclasses.replace(find_parent("toy-base", ("base",)), model_name="Robin")

    def taught(**changes):
        return mixtures.sft(sft.SftSettings(**changes), parent, path)

    train, val = taught(model_name="Ada")
    assert "Ada" in texts(train) and "It is 14." in texts(train) and "Robin" not in texts(train)
    assert "Ada" not in texts(val)
    assert train.fingerprint() != taught(model_name="Eve")[0].fingerprint()
    assert "Robin" not in texts(taught()[0]), "the user's own conversations alone"
    assert "Robin" in texts(mixtures.mid(ChatStageSettings(demo=True), parent)[1])
    assert "Robin" not in texts(mixtures.mid(ChatStageSettings(demo=True, model_name="Ada"), parent)[1])


def test_own_conversations_are_shuffled_by_the_seed(home, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in LINES))
    parent = find_parent("toy-base", ("base",))

    def order(seed):
        train, _ = mixtures.sft(sft.SftSettings(seed=seed), parent, path)
        return [train[i]["messages"][0]["content"] for i in range(len(train))]

    first, other = order(1), order(2)
    assert first == order(1) != other and sorted(first) == sorted(other)
    numbers = [int(question.split()[-1][:-1]) for question in first]
    assert min(numbers[:10]) < 20 and max(numbers[:10]) > 40, "the beginning is not the file's"


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_come_anew_in_every_pass_where_they_are_shuffled(shuffle, monkeypatch):
    loaders = []
    monkeypatch.setattr(supervised, "RowLoader", lambda *a: loaders.append(RowLoader(*a)) or loaders[-1])
    monkeypatch.setattr(supervised, "with_batch_size", lambda job, attempt: None)
    job: Any = SimpleNamespace(num_iterations=6, rows_per_step=4, settings=SimpleNamespace(seed=3))
    rows: Any = ([0] * 12, [])
    for _ in range(2):
        supervised.train_on(job, rows, shuffle=shuffle)
    first, again = ([loader.indices_for(step) for step in range(6)] for loader in loaders)
    passes = [sum(first[at : at + 3], []) for at in (0, 3)]
    assert first == again and [sorted(one) for one in passes] == [list(range(12))] * 2
    assert (passes[0] != passes[1] != list(range(12))) is shuffle
