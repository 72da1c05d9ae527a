"""Ladders of depths and what they say: the multiplier of made-up curves is what they were made with, rungs are trained
once, and what cannot be compared is refused."""

import math

import pytest

from nanochat_jax.data.build_rows import PACKINGS
from nanochat_jax.report import curve
from nanochat_jax.report.curve import CurveError, Rung
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.stages import miniseries
from nanochat_jax.utils.paths import base_dir
from tests import toy_runs


def rungs(name, worth=1.0, noise=(0.0,), depths=(2, 3, 4, 5), slope=0.1):
    """A power law whose every FLOP counts `worth` times; noise: of each seed, in log FLOPs."""
    made = []
    for seed, shift in enumerate(noise, 42):
        for depth in depths:
            flops = 1e12 * depth**3
            bpb = 3 * (flops * worth * math.exp(shift) / 1e12) ** -slope
            made.append(
                Rung(
                    f"{name}-d{depth}-s{seed}",
                    "v1",
                    "",
                    depth,
                    seed,
                    1,
                    1,
                    flops,
                    float(depth),
                    dict.fromkeys(PACKINGS, bpb),
                )
            )
    return made


@pytest.mark.parametrize("worth", [0.7, 1.0, 1.6])
def test_the_multiplier_is_what_the_curve_was_made_with(worth):
    found = curve.multiplier(rungs("a"), rungs("b", worth), "stream")
    assert found.value == pytest.approx(worth, rel=1e-6) and found.low is None and "one seed" in found.verdict


def test_seeds_give_an_interval_and_a_verdict():
    noise = (-0.02, 0.0, 0.02)
    found = curve.multiplier(rungs("a", noise=(0, 0, 0)), rungs("b", 1.5, noise), "stream")
    half = 4.303 * 0.02 / math.sqrt(3)  # Student's t, two degrees of freedom
    assert found.value == pytest.approx(1.5) and found.seeds == 3 and found.verdict == "better"
    assert (found.low, found.high) == pytest.approx((1.5 * math.exp(-half), 1.5 * math.exp(half)), rel=1e-3)
    assert curve.multiplier(rungs("a", noise=noise), rungs("b", 0.5, noise), "stream").verdict == "worse"
    assert (
        "holds 1" in curve.multiplier(rungs("a", noise=(0, 0, 0)), rungs("b", 1.01, (-0.1, 0, 0.1)), "stream").verdict
    )


@pytest.mark.parametrize(
    ("baseline", "variant", "word"),
    [
        (rungs("a"), rungs("b", 1e6), "overlap"),
        (rungs("a", depths=(2,)), rungs("b"), "two depths"),
        (rungs("a"), rungs("b", slope=-0.1), "no fewer bits"),
        ([], rungs("b"), "no seed"),
    ],
)
def test_curves_that_cannot_be_compared(baseline, variant, word):
    with pytest.raises(CurveError, match=word):
        curve.multiplier(baseline, variant, "best_fit")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """In place of training: runs that are complete at once. The list of those trained."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    toy_runs.toy_tokenizer().save(tmp_path / "tokenizer")
    names = []

    def pretrain(arguments):
        given = dict(argument.removeprefix("--").split("=") for argument in arguments)
        settings = miniseries.base.BaseSettings(
            recipe=given["recipe"], depth=int(given["depth"]), seed=int(given["seed"]), off=given.get("off", ""),
            total_batch_size=2048, num_iterations=int(given["num_iterations"]), device_batch_size=1,
        )  # fmt: skip
        plan = miniseries.base.plan_of(settings, 500, 1)
        names.append(given["run_name"])
        folder = toy_runs.saved_run(
            given["run_name"], toy_runs.toy_tokenizer(), plan.config, steps=(4,), identity={"num_iterations": 4},
            settings={**vars(settings)},
        )  # fmt: skip
        bpb = 3.0 - 0.1 * settings.depth - 0.2 * (settings.recipe == "modern")
        (folder / "metrics.jsonl").write_text(
            '{"kind": "train", "step": 0, "seconds": 2.5}\n' + f'{{"kind": "eval", "step": 4, "val_bpb": {bpb}}}\n'
            f'{{"kind": "eval", "step": 4, "stream_bpb": {bpb}, "best_fit_bpb": {bpb - 0.01}}}\n'
        )
        assert metrics.read(folder / "metrics.jsonl") and checkpoint.steps(folder) == [4]

    monkeypatch.setattr(miniseries, "_pretrain", pretrain)
    return names


FLAGS = ["--", "--num_iterations=4", "--max_seq_len=256", "--total_batch_size=2048", "--device_batch_size=1"]


def test_rungs_are_trained_once_and_compared(trained, capsys):
    assert miniseries.main(["--name=plain", "--depths=2,1", *FLAGS]) == 0
    assert trained == ["plain-d1-s42", "plain-d2-s42"]
    assert miniseries.main(["--name=plain", "--depths=1,2", "--seeds=2", *FLAGS]) == 0
    assert trained[2:] == ["plain-d1-s43", "plain-d2-s43"]
    found = curve.load("plain")
    assert [(r.depth, r.seed) for r in found] == [(1, 42), (1, 43), (2, 42), (2, 43)]
    assert found[0].tokens == 4 * 2048 and found[0].flops > 0 and found[0].seconds == 2.5
    arguments = ["--name=new", "--depths=1,2", "--recipe=modern", "--set=smear=off,backout=off", "--against=plain"]
    capsys.readouterr()
    assert miniseries.main([*arguments, "--seeds=2", *FLAGS]) == 1  # no curve of these two reaches what the other does
    assert "overlap" in capsys.readouterr().err
    assert [r.off for r in curve.load("new")] == ["backout,smear"] * 4
    page = curve.folder_of("plain") / "report.html"
    assert "plain-d2-s43" in page.read_text() and "<svg" in page.read_text()
    assert miniseries.main(["--name=plain", "--against=plain"]) == 0
    shown = capsys.readouterr().out
    assert "over plain, text as it streams: 1.00" in shown and "over plain, documents from their start: 1.00" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--depths=2,3"], "--name"),
        (["--name=a", "--depths=2"], "--depths=2"),
        (["--name=a", "--depths=2,x"], "--depths=2,x"),
        (["--name=a", "--depths=2,3", "--set=rope=off"], "--set=rope=off"),
        (["--name=a", "--depths=2,3", "--recipe=v1", "--set=smear=off"], "--off"),
        (["--name=a", "--depths=2,3", "--seeds=0"], "--seeds"),
        (["--name=a", "--depths=2,3", "--against=nothing"], "nothing"),
        (["--name=a"], "'a'"),
    ],
)
def test_what_makes_no_ladder_is_refused(trained, capsys, arguments, named):
    assert miniseries.main([*arguments, *FLAGS]) == 1
    assert named in capsys.readouterr().err and not trained


def test_a_run_of_another_recipe_is_not_taken_for_a_rung(trained, capsys):
    assert miniseries.main(["--name=a", "--depths=1,2", *FLAGS]) == 0
    assert miniseries.main(["--name=a", "--depths=1,2", "--recipe=modern", *FLAGS]) == 1
    assert "a-d1-s42" in capsys.readouterr().err and base_dir().is_dir()


@pytest.mark.slow
def test_a_ladder_is_really_trained(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    toy_runs.toy_tokenizer().save(tmp_path / "tokenizer")
    flags = ["--demo", "--device=cpu", "--num_iterations=3", "--max_seq_len=192", "--total_batch_size=1536"]
    flags += ["--device_batch_size=8", "--eval_tokens=1536", "--sample_every=0"]
    assert miniseries.main(["--name=m", "--depths=1,2", "--recipe=modern", "--", *flags]) == 0
    out = capfd.readouterr().out
    assert "rung 2 of 2" in out and "left" in out and [r.depth for r in curve.load("m")] == [1, 2]
    own = [r["val_bpb"] for r in metrics.read(checkpoint.run_dir("m-d1-s42") / "metrics.jsonl") if "val_bpb" in r]
    found = curve.load("m")[0].bpb
    assert found["best_fit"] == own[-1] != found["stream"]  # its own packing, and the other
    assert miniseries.main(["--name=m", "--depths=1,2", "--recipe=modern", "--", *flags]) == 0
    assert "rung" not in capfd.readouterr().out  # nothing is trained again
