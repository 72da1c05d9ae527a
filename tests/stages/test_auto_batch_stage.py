"""--device_batch_size=auto and a memory that runs out, in a real pretraining run on simulated devices."""

import contextlib
import dataclasses
import functools
import io
import random

import jax
import pytest

from nanochat_jax.planner import fit_batch
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.training import loop
from tests import toy_runs

OUT = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1099511627776 bytes."


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("auto"), random.Random(0)
    words = "the a cat dog sun moon walks sings sees under over river tree".split()
    documents = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(300)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return folder


def start(folder, name: str, **changes) -> int:
    """Trains on the text in `folder`, as a user starts it; the exit code."""
    flags = dict(depth=1, max_seq_len=32, total_batch_size=512, num_iterations=5, eval_every=0, eval_tokens=256)
    flags |= dict(save_every=2, data=folder / "text.txt", run_name=name, grad_clip=0)
    return toy_runs.start("base", **{**flags, **changes})


@pytest.fixture
def train(text, monkeypatch):
    toy_runs.use(text, monkeypatch, samples=False)
    return functools.partial(start, text)


def losses(name: str) -> list[float]:
    records = metrics.read(checkpoint.run_dir(name) / "metrics.jsonl")
    return [r["loss"] for r in records if r["kind"] == "train"]


@dataclasses.dataclass
class Auto:
    printed: str
    measured: list  # the bytes that each compiled program needs
    losses: list[float]
    rows: int  # per device


@pytest.fixture(scope="module")
def auto(text) -> Auto:
    """An uninterrupted run that chose its batch itself."""
    compiled, real = [], fit_batch.measured
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        toy_runs.use(text, patch, samples=False)
        patch.setattr(fit_batch, "least_free_memory", lambda: 2**33)
        patch.setattr(fit_batch, "measured", lambda lower: compiled.append(n := real(lower)) or n)
        assert start(text, "auto", device_batch_size="auto") == 0
        rows = checkpoint.load_meta(checkpoint.run_dir("auto"))["settings"]["device_batch_size"]
        return Auto(out.getvalue(), compiled, losses("auto"), rows)


@pytest.mark.slow
def test_auto_takes_the_largest_that_fits_and_checks_the_rest(auto):
    assert "device batch size: 2 rows x 1 accumulated (2 needs" in auto.printed and "8.0 GiB" in auto.printed
    assert "512 tokens = 2 rows x 32 tokens x 8 devices x 1 accumulated" in auto.printed
    assert len(auto.measured) == 3 and None not in auto.measured  # the step, once; sampling and the evaluation
    assert auto.rows == 2
    assert len(auto.losses) == 5


def test_what_does_not_fit_is_said_before_training(train, monkeypatch, capsys):
    monkeypatch.setattr(fit_batch, "least_free_memory", lambda: 1000)
    monkeypatch.setattr(fit_batch, "measured", lambda lower: 2000)
    assert train("small", device_batch_size="auto") == 1
    assert "--remat=block" in capsys.readouterr().err
    assert train("small", device_batch_size=1) == 1
    assert "sampling would need" in capsys.readouterr().err
    assert losses("small") == []


@pytest.mark.slow
@pytest.mark.parametrize("donated", [False, True])
def test_a_memory_that_runs_out_halves_the_batch_and_resumes(train, auto, monkeypatch, capsys, donated):
    """From the same step where the state is still there, from the last checkpoint where the failed step took it."""
    fails, real = [True], loop._compile

    def compile_(*args):
        step = real(*args)

        def run(state, *batch):
            if fails and int(state.step) == 3:
                fails.clear()
                if donated:
                    step(state, *batch)
                raise jax.errors.JaxRuntimeError(OUT)
            return step(state, *batch)

        return run

    monkeypatch.setattr(loop, "_compile", compile_)
    name = f"out-{donated}"
    assert train(name, device_batch_size=2) == 0 and not fails
    out = capsys.readouterr().out
    assert "ran out of memory at step 3" in out and "--device_batch_size=1" in out
    assert f"from step {2 if donated else 3}" in out
    assert losses(name) == pytest.approx(auto.losses, abs=2e-6)  # accumulation: the same step
    noted = [r for r in metrics.read(checkpoint.run_dir(name) / "metrics.jsonl") if r["kind"] == "incident"]
    assert noted == [{"kind": "incident", "step": 3, "what": "out of memory", "rows": 2}]


def always(message: str):
    """A compiler whose steps all end so."""

    def run(*batch):
        raise jax.errors.JaxRuntimeError(message)

    return lambda *args: run


def test_memory_that_never_suffices_ends_with_the_remedy(train, monkeypatch, capsys):
    monkeypatch.setattr(loop, "_compile", always(OUT))
    assert train("never", device_batch_size=2) == 1
    captured = capsys.readouterr()
    assert "--device_batch_size=1" in captured.out
    assert "--remat=block" in captured.err and "--max_seq_len" in captured.err


def test_other_errors_are_not_mistaken_for_it(train, monkeypatch):
    monkeypatch.setattr(loop, "_compile", always("INTERNAL: a wire is loose"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="loose"):
        train("loose", device_batch_size=2)
