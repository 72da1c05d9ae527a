"""Pretraining as a user starts it: flags, errors with remedies, resume rules. Small model, eight simulated devices."""

import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from nanochat_jax.data.build_rows import build_rows
from nanochat_jax.data.documents import FileDocuments
from nanochat_jax.data.shards import Shard, ShardList
from nanochat_jax.demo_world import demo_documents
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.loss import token_nll
from nanochat_jax.parallel import sharding
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.stages.main import main
from nanochat_jax.stages.pipeline import held_out
from nanochat_jax.text.tokenizer import Tokenizer
from tests import toy_runs
from tests.toy_params import toy_params
from tests.web_server import WebServer


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with text to train on, beside a base directory."""
    toy_runs.use(tmp_path / "base", monkeypatch)
    (tmp_path / "text.txt").write_text("\n\n".join(demo_documents("train", 300_000)))
    return tmp_path


def train(base, **changes) -> int:
    flags = dict(eval_every=2, save_every=2, data=base / "text.txt", run_name="r")
    return toy_runs.start("base", **{**toy_runs.FLAGS, **flags, **changes})


def test_one_run_then_every_rule_of_resuming(base, capsys):
    assert train(base) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and out.index("FLOPs per token") < out.index("train step compiled"), "plan comes first"
    assert "held-out bits per byte" in out and "The capital of France is" in out
    run = checkpoint.run_dir("r")
    records = metrics.read(run / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(4))
    assert all(r["lr_multiplier"] > 0 and r["mfu"] > 0 for r in records if r["kind"] == "train")

    assert train(base) == 0, "a finished run has nothing to do"
    assert "from step 4" in capsys.readouterr().out
    assert metrics.read(run / "metrics.jsonl") == records

    assert train(base, matrix_lr=0.01) == 1
    error = capsys.readouterr().err
    assert "matrix_lr: 0.02 -> 0.01" in error and "--run_name" in error and "--resume=False" in error

    Tokenizer.train(demo_documents("train", 100_000), 500).save(base / "base" / "tokenizer")
    assert train(base) == 1
    error = capsys.readouterr().err
    assert "tokenizer" in error and str(run) in error
    assert checkpoint.steps(run)[-1] == 4, "nothing saved is lost"

    assert train(base, resume=False) == 0
    assert checkpoint.steps(run.with_name("r.old1"))[-1] == 4
    losses = [r["loss"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "train"]
    assert len(losses) == 4 and losses != [r["loss"] for r in records if r["kind"] == "train"]


@pytest.mark.parametrize(  # of 33 rows the last batch is never full, but for the first of these
    "devices, size", [*(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (8, 4))), (1, 4), (8, 1)]
)
def test_the_held_out_loss_does_not_depend_on_the_batch_size(base, devices, size):
    tokenizer = Tokenizer.load()
    rows = build_rows(FileDocuments(base / "text.txt", "all"), tokenizer, 16, split="val", max_rows=33)
    config = GPTConfig.from_depth(1, tokenizer.vocab_size, 16)
    params = toy_params(config)
    tokens = np.stack([rows[i] for i in range(33)]).astype(np.int32)
    nats = np.asarray(jax.jit(token_nll, static_argnums=0)(config, params, tokens[:, :-1], tokens[:, 1:]))
    sizes = tokenizer.token_bytes()[tokens[:, 1:]]
    bits = nats[sizes > 0].sum() / sizes.sum() / np.log(2)
    found = held_out(config, rows, size, tokenizer, sharding.make_mesh(jax.devices()[:devices]))(params)
    assert found == {"val_loss": pytest.approx(nats.mean(), rel=1e-5), "val_bpb": pytest.approx(bits, rel=1e-5)}


def test_sigterm_while_the_first_text_is_fetched(base, capsys):
    folder, server = base / "shards", WebServer()
    folder.mkdir()
    server.files, server.plan = {"shard_00000.parquet": bytes(100)}, [{"stall": 10}]
    shards = [Shard(f"shard_0000{i}.parquet", 100, "0" * 64) for i in range(2)]
    ShardList(server.url, tuple(shards), shards[0].name).save(folder)
    sent, over = [], threading.Event()

    def when_it_waits():  # not by the clock: before the run has its handler the signal would end the tests
        while not server.requests and not over.wait(0.02):
            pass
        if not over.wait(0.5):
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=when_it_waits)
    thread.start()
    try:
        assert train(base, data=folder) == 0 and sent, "it was waiting"
        assert time.monotonic() - sent[0] < 5, "the server would have let it wait for ten seconds"
    finally:
        over.set()
        thread.join()
        server.close()
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert not checkpoint.steps(checkpoint.run_dir("r"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_mistakes_name_the_flag_and_the_remedy(base, capsys):
    with pytest.raises(SystemExit) as exit:
        train(base, dept=3)
    assert exit.value.code == 2 and "did you mean --depth?" in capsys.readouterr().err
    assert train(base, total_batch_size=2000) == 1
    assert "--total_batch_size=1536 or 3072" in capsys.readouterr().err
    assert train(base, data=base / "nowhere.txt") == 1
    assert "nowhere.txt" in capsys.readouterr().err
    assert train(base, data="") == 1
    assert "--data=PATH" in capsys.readouterr().err
    assert train(base, run_name="a/b") == 1
    assert "a/b" in capsys.readouterr().err
    (base / "base" / "tokenizer" / "tokenizer.json").unlink()
    assert train(base) == 1
    assert "scripts.tok_train" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--stage=bass"]])
def test_a_stage_is_needed(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "--stage=base" in capsys.readouterr().err


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--stage=base", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "--depth" in out and "--total_batch_size" in out and "default 20" in out
