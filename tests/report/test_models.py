"""The list of models tells what is on disk, also of what is damaged."""

import json
import os
import re

from nanochat_jax.evals import results
from nanochat_jax.model.gpt import GPTConfig, num_params
from nanochat_jax.report import list_runs
from nanochat_jax.runs import checkpoint
from nanochat_jax.text.tokenizer import Tokenizer
from tests.toy_runs import saved_run, small_tokenizer

CONFIG = GPTConfig(sequence_len=16, vocab_size=270, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)


def make_run(name, stage, steps=(4,), **meta):
    return saved_run(name, small_tokenizer(), CONFIG, stage, steps, **meta)


def test_what_is_recorded_is_listed(base, capsys):
    make_run("d1", "base", (4, 8), identity={"num_iterations": 9, "rows": "ab" * 32}, code={"commit": "c" * 40})
    folder = make_run("d1-sft", "sft", parent={"run": "d1", "step": 8, "stage": "base"})
    items = [{"id": str(i), "correct": i % 2} for i in range(20)]
    results.save(folder, 4, results.scored("world/sums", "generative", items, 0.0, {}, 1.0))
    make_run("x", "sft", imported={"kind": "hf", "name": "folder"}, code={"commit": "d" * 40, "dirty": True})
    first, second, third = list_runs.models()
    assert (first.run, first.stage, first.step, first.planned, first.steps) == ("d1", "base", 8, 9, [4, 8])
    assert first.parameters == num_params(CONFIG) and first.data == "ab" * 32 and first.commit == "c" * 40
    assert first.bytes > 4 * num_params(CONFIG) and first.tokenizer == small_tokenizer().hash and not first.problem
    assert second.parent == "d1@8" and list(second.scores) == ["world/sums"]
    assert second.scores["world/sums"].startswith("0.5000 [")
    assert third.origin == "hf files folder" and third.commit.endswith("+")

    assert list_runs.main([]) == 0
    out = capsys.readouterr().out
    for part in ("step 8 of 9", "4, 8", "parent d1@8", "world/sums: 0.5", "hf files", small_tokenizer().hash[:12]):
        assert part in out, part
    assert list_runs.main(["--json", "--stage=sft"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [m["run"] for m in listed] == ["d1-sft", "x"]


def test_scores_of_another_step_say_so(base):
    folder = make_run("r", "base", (4, 8))
    results.save(folder, 4, {"task": "bpb", "kind": "bpb", "bpb": 1.5, "settings": {}})
    assert list_runs.models()[0].scores == {"bpb (step 4)": "1.5000"}


def test_problems_are_listed_and_do_not_hide_the_rest(base, capsys):
    make_run("good", "base")
    other = make_run("other", "base")
    Tokenizer.train(["entirely different words here"] * 4, 268).save(other)
    broken = make_run("broken", "base")
    next((checkpoint.step_dir(broken, 4) / "state").rglob("d/*")).unlink()
    found = {m.run: m.problem for m in list_runs.models()}
    assert not found["good"] and "damaged" in found["broken"]
    assert small_tokenizer().hash[:12] in found["other"] and "tokenizer.json is" in found["other"]
    assert list_runs.main([]) == 0 and "cannot be used" in capsys.readouterr().out


def test_what_was_chosen_and_what_else_could_have_been(base):
    def said(run=None, stage=None, step=None):
        return checkpoint.chosen(checkpoint.load_model(run, stage, step)[3], run, stage)

    folder = make_run("d1", "base", (4, 8))
    os.utime(checkpoint.step_dir(folder, 4) / "meta.json", (86_400 * 366, 86_400 * 366.5))  # the 2nd of January 1971
    assert re.fullmatch(r"d1, stage base, step 8, saved \d{4}-\d\d-\d\d \d\d:\d\d", said()[0]) and said()[1] == ""
    assert re.search(r"step 4, saved 1971-01-0[23] \d\d:\d\d$", said(step=4)[0]), "when this step was saved"
    make_run("d1-sft", "sft")
    assert said()[1] == "the newest of 2 runs: --run=NAME takes another, python -m scripts.models lists them"
    assert said("d1")[1] == said(stage="base")[1] == said(stage="sft")[1] == "", "nothing else could have been meant"
    make_run("d2", "base")
    assert said(stage="base")[0].startswith("d2, ") and said(stage="base")[1].startswith("the newest of 2 base runs: ")
    meta = {"run": "gone", "stage": "base", "step": 3}
    assert checkpoint.chosen(meta, "gone", None) == ("gone, stage base, step 3", ""), "removed meanwhile"


def test_nothing_there_says_what_to_do(base, capsys):
    assert list_runs.main([]) == 1
    assert "import_checkpoint" in capsys.readouterr().err
    assert list_runs.main(["--run=nope"]) == 1
