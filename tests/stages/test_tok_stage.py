import dataclasses
import json
import sys
from pathlib import Path

import pytest

from nanochat_jax.evals import compression as tok_eval
from nanochat_jax.evals.compression import Measure, TokEvalSettings, evaluate, relative_saving
from nanochat_jax.stages.tokenizer import DEMO, TokTrainSettings, main, parse_settings, train_tokenizer
from nanochat_jax.text.tokenizer import Tokenizer, TokenizerError
from tests import children
from tests.tokenizer_fixtures import golden, golden_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing cached"))
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in golden("tokenizer_v1")["corpora"].items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "val.txt").write_text("Held out: the harbor was quiet.")
    return str(folder)


def test_training_equals_training_by_hand(data, base, capsys):
    tokenizer = train_tokenizer(TokTrainSettings(data=data, vocab_size=400))
    corpora = golden("tokenizer_v1")["corpora"]
    texts = [text for name in sorted(corpora) for text in corpora[name]]
    assert tokenizer.hash == Tokenizer.train(texts, 400).hash == Tokenizer.load().hash
    shown = capsys.readouterr().out
    assert "400 tokens" in shown and str(base / "tokenizer") in shown
    assert tokenizer.training["documents"] == len(texts) and "Held out" not in "".join(texts)


def test_limits_reach_the_trainer(data):
    tokenizer = train_tokenizer(TokTrainSettings(data=data, vocab_size=300, doc_cap=20, max_chars=100))
    assert tokenizer.training["characters"] <= 120 and tokenizer.training["documents"] >= 5, "of 20 characters each"


def test_trained_once_kept_otherwise_set_aside(data, base, capsys):
    settings = TokTrainSettings(data=data, vocab_size=300)
    first = train_tokenizer(settings)
    before = (base / "tokenizer" / "tokenizer.json").read_bytes()
    capsys.readouterr()
    assert train_tokenizer(settings).hash == first.hash
    assert "already trained" in capsys.readouterr().out
    assert (base / "tokenizer" / "tokenizer.json").read_bytes() == before
    second = train_tokenizer(TokTrainSettings(data=data, vocab_size=310))
    aside = base / "tokenizer" / f"tokenizer-{first.hash[:12]}.json"
    assert aside.read_bytes() == before and Tokenizer.load().hash == second.hash != first.hash
    (base / "tokenizer" / "tokenizer.json").write_text("{")
    assert train_tokenizer(TokTrainSettings(data=data, vocab_size=310)).hash == second.hash
    assert "damaged" in capsys.readouterr().err
    capsys.readouterr()
    train_tokenizer(TokTrainSettings(data=data, vocab_size=310, force=True))
    assert "already" not in capsys.readouterr().out


def test_a_vocabulary_beyond_the_text_is_told(data, capsys):
    tokenizer = train_tokenizer(TokTrainSettings(data=data, vocab_size=60_000))
    shown = capsys.readouterr().out
    assert tokenizer.vocab_size < 60_000
    assert "warning: " in shown and f" {tokenizer.vocab_size} tokens" in shown and "60000" in shown


def test_mistakes_become_one_line_and_a_status(data, capsys):
    def attempt(**settings):
        status = main([f"--{name}={value}" for name, value in {"data": data, **settings}.items()])
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        return status, shown

    mistakes = {"vocab_size": 264, "doc_cap": 0, "max_chars": 0, "data": "", "text_column": "body"}
    for flag, value in mistakes.items():
        status, shown = attempt(**{flag: value})
        assert status == 1 and (f"--{flag}" in shown or str(value) in shown), shown
    assert "/missing" in attempt(data=data + "/missing")[1]


def test_the_demo_is_a_set_of_defaults_and_the_others_are_the_references():
    assert parse_settings(["--demo"]) == DEMO
    defaults = TokTrainSettings()
    assert (defaults.max_chars, defaults.doc_cap, defaults.vocab_size) == (10_000_000_000, 10_000, 65536)


def test_a_tokenizer_that_loses_text_is_not_saved(data, base, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(TokenizerError, match="exactly"):
        train_tokenizer(TokTrainSettings(data=data, vocab_size=300))
    assert not (base / "tokenizer" / "tokenizer.json").exists()


def test_progress_lines_without_a_terminal(data, monkeypatch, capsys):
    monkeypatch.setattr("nanochat_jax.utils.progress.LINE_EVERY_S", 0.0)
    train_tokenizer(TokTrainSettings(data=data, vocab_size=300))
    shown = capsys.readouterr().out
    documents = sum(map(len, golden("tokenizer_v1")["corpora"].values()))
    assert f"reading: {documents} documents" in shown and "merging: 35 of 35" in shown


def test_evaluation_without_stock_encodings(data, base, capsys):
    golden_tokenizer().save(base / "tokenizer")
    results = evaluate(TokEvalSettings(data=data))
    shown = capsys.readouterr().out
    assert "gpt2" in shown and "cl100k_base" in shown and "NANOCHAT_OFFLINE" in shown
    assert list(results) == ["ours"] and {"news", "korean", "german", "code", "math", "science"} < set(results["ours"])
    for name, measured in results["ours"].items():
        if name in tok_eval.TEXTS:
            text = tok_eval.TEXTS[name]
            assert measured == Measure(len(text.encode()), len(golden_tokenizer().encode(text)))
    assert results["ours"]["val"].bytes == len("Held out: the harbor was quiet.")
    saved = json.loads((base / "tokenizer" / "evaluation.json").read_text())
    assert saved["tokenizer_hash"] == golden_tokenizer().hash and saved["measures"]["ours"]["news"]["tokens"] > 0


def test_evaluation_against_another_encoding(base, monkeypatch, capsys):
    golden_tokenizer().save(base / "tokenizer")
    small = Tokenizer([bytes([i]) for i in range(256)], {"<|endoftext|>": 256}, bos="<|endoftext|>")
    monkeypatch.setattr(Tokenizer, "from_tiktoken", classmethod(lambda cls, name: small))
    results = evaluate(TokEvalSettings(encodings="bytes_only"))
    shown = capsys.readouterr().out
    assert "compression against bytes_only" in shown and "no text of your own is measured" in shown
    ours, theirs = results["ours"]["news"], results["bytes_only"]["news"]
    assert theirs.tokens == theirs.bytes == ours.bytes and theirs.ratio == 1 < ours.ratio
    assert relative_saving(ours, theirs) == pytest.approx(100 * (1 - 1 / ours.ratio))


def test_evaluation_needs_a_tokenizer(capsys):
    assert tok_eval.main([]) == 1
    assert "tok_train" in capsys.readouterr().err


def test_the_scripts_run(data, base):
    train = [sys.executable, "-m", "scripts.tok_train", f"--data={data}", "--vocab_size=300"]
    done = children.run(train, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = children.run([sys.executable, "-m", "scripts.tok_eval"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "vocabulary: ours 300" in done.stdout, done.stderr
    done = children.run([*train, "--vocab=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--vocab_size" in done.stderr


def test_the_demo_needs_no_data(base):
    tokenizer = train_tokenizer(dataclasses.replace(DEMO, max_chars=50_000, vocab_size=400))
    assert tokenizer.vocab_size == 400 and 50_000 <= tokenizer.training["characters"] < 60_000
    assert tokenizer.encode(" the") != [*b" the"]
