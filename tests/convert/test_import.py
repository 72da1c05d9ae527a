"""Models from elsewhere become runs on which everything works as on our own."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.convert import InterchangeError, import_run, pt_files, reference, tokenizer_json
from nanochat_jax.convert.import_run import ImportSettings, import_checkpoint
from nanochat_jax.convert.params_reference import params_to_reference
from nanochat_jax.convert.reference import read_config
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model import gpt
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.runs import checkpoint
from nanochat_jax.stages.pipeline import find_parent
from nanochat_jax.text.tokenizer import Tokenizer
from tests.golden_models import golden_arrays
from tests.toy_runs import small_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "interchange"
RECORDED = json.loads((GOLDEN / "meta_000007.json").read_text())
forward = jax.jit(gpt.forward, static_argnums=0)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "ours"))
    return tmp_path


@pytest.fixture
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def theirs(base, tokenizer):
    """A base directory as the reference leaves it: checkpoint written by torch, tokenizer pickled by tiktoken."""
    folder = base / "theirs"
    place = folder / "mid_checkpoints" / "d1"
    place.mkdir(parents=True)
    for name in ("model_000007.pt", "meta_000007.json"):
        shutil.copy(GOLDEN / name, place)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer._encoding))
    with open(folder / "tokenizer" / "token_bytes.pt", "wb") as file:
        pt_files.write(file, tokenizer.token_bytes(v1_compat=True))
    return folder


@pytest.fixture
def hf(base, tokenizer):
    """A sharded folder as transformers writes it, with our tokenizer."""
    folder = base / "hf"
    shutil.copytree(GOLDEN / "hf", folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json.to_json(tokenizer)))
    return folder


def run(path: Path, **settings) -> Path:
    return import_checkpoint(ImportSettings(path=path, **settings))


def changed(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_reference_checkpoint(theirs, tokenizer, capsys):
    """Compile prefix, bfloat16 embedding, grouped keys, a meta file without n_kv_head."""
    folder = run(theirs)
    out = capsys.readouterr().out
    sizes, arrays = RECORDED["model_config"], golden_arrays("interchange/model_000007")
    keys = next(array for name, array in arrays.items() if name.endswith("c_k.weight"))
    n_kv_head = keys.shape[0] // (sizes["n_embd"] // sizes["n_head"])
    assert folder.name == "d1-mid" and f"n_kv_head (taken: {n_kv_head})" in out
    config, params, loaded, meta = checkpoint.load_model("d1-mid")
    assert config == GPTConfig(**{**sizes, "n_kv_head": n_kv_head})
    assert loaded.hash == tokenizer.hash and (meta["stage"], meta["step"]) == ("mid", 7)
    assert meta["imported"]["meta"]["val_bpb"] == RECORDED["val_bpb"]
    assert len(meta["imported"]["files"]["model_000007.pt"]) == 64
    ours = params_to_reference(config, params)
    assert ours.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours[name], array)


def test_everything_works_on_it(theirs):
    """It is found as a parent, decodes, and is found by name and stage."""
    run(theirs / "mid_checkpoints" / "d1" / "model_000007.pt", run_name="theirs")
    parent = find_parent("", ("mid", "base"))
    assert (parent.run, parent.step, parent.stage) == ("theirs", 7, "mid")
    config, params, tokenizer, _ = checkpoint.load_model(stage="mid")
    jax.tree.map(np.testing.assert_array_equal, parent.params(), params)
    engine = Engine(config, params, tokenizer, slots=1)
    (completion,) = engine.generate([[tokenizer.bos_id]], SamplingParams(4, temperature=0.0))
    logits = forward(config, params, jnp.asarray([[tokenizer.bos_id]]))
    assert completion.tokens[0] == int(logits[0, 0].argmax())


def test_a_transformers_folder_gives_its_logits(hf, capsys):
    folder = run(hf, run_name="hf", stage="base")
    assert "rotary tables float32" in capsys.readouterr().out
    config, params, _, _ = checkpoint.load_model(folder.name)
    given = json.loads((hf / "config.json").read_text())
    sizes = [given[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")]
    assert [config.n_layer, config.n_head, config.n_kv_head, config.rotary_dtype] == [*sizes, "float32"]
    expected = golden_arrays("interchange/hf_logits")
    logits = forward(config, params, jnp.asarray(expected["ids"]))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    rounded = dataclasses.replace(config, rotary_dtype="bfloat16")
    assert np.abs(forward(rounded, params, jnp.asarray(expected["ids"])) - expected["logits"]).max() > 1e-4


def test_rotary_tables_in_float32_are_the_references():
    arrays = golden_arrays("model_v1")
    n, half = arrays["A/rotary/cos"].shape
    for table, name in zip(gpt.rotary_tables(n, 2 * half, 10000.0, "float32"), ("cos", "sin"), strict=True):
        np.testing.assert_allclose(table, arrays[f"A/rotary/{name}_unrounded"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="rotary_dtype"):
        GPTConfig(rotary_dtype="float16")


def test_precision_stage_and_older_config_forms(hf, capsys):
    config = hf / "config.json"
    changed(config, dtype="bfloat16", rope_parameters=None, rope_theta=500.0, rms_norm_eps=1e-6)
    changed(config, final_logit_softcapping=None, logits_soft_cap=20.0)
    (hf / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    run(hf)
    out = capsys.readouterr().out
    assert "rms_norm_eps is 1e-06" in out and "taken as a sft model" in out and "taken to be bfloat16" in out
    config, _, _, meta = checkpoint.load_model("hf-sft")
    assert (config.rotary_dtype, config.rotary_base, config.softcap, meta["stage"]) == ("bfloat16", 500.0, 20.0, "sft")


def test_tensors_that_do_not_fit_are_all_listed(theirs, hf):
    place = theirs / "mid_checkpoints" / "d1"
    arrays = {k.removeprefix("_orig_mod."): np.float32(v) for k, v in pt_files.read(place / "model_000007.pt").items()}
    arrays["transformer.h.0.attn.c_gate.weight"] = arrays.pop("transformer.h.0.mlp.c_fc.weight")
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:, :8]
    with open(place / "model_000007.pt", "wb") as file:
        pt_files.write(file, arrays)
    with pytest.raises(InterchangeError) as caught:
        run(theirs)
    message = str(caught.value)
    assert "missing transformer.h.0.mlp.c_fc.weight" in message
    assert "unexpected transformer.h.0.attn.c_gate.weight" in message
    vocab, width = RECORDED["model_config"]["vocab_size"], RECORDED["model_config"]["n_embd"]
    assert f"lm_head.weight has shape ({vocab}, 8), the config needs ({vocab}, {width})" in message
    changed(hf / "config.json", num_hidden_layers=1)
    with pytest.raises(InterchangeError, match=r"unexpected model\.layers\.1\.self_attn\.q_proj\.weight"):
        run(hf)


def test_models_that_cannot_run_here_are_refused_with_the_reason(theirs, hf, monkeypatch):
    reasons = {
        "model_type": "llama", "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": True,
        "intermediate_size": 99, "head_dim": 3, "rms_norm_eps": 0.1,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
    }  # fmt: skip
    original = (hf / "config.json").read_text()
    for key, value in reasons.items():
        (hf / "config.json").write_text(original)
        changed(hf / "config.json", **{key: value})
        with pytest.raises(InterchangeError, match=r"config\.json"):
            run(hf)
    changed(theirs / "mid_checkpoints" / "d1" / "meta_000007.json", model_config={"window_pattern": "SSSL"})
    with pytest.raises(InterchangeError, match="window_pattern.*resid_lambdas"):
        run(theirs)
    for pattern in ("SQL", 5):
        meta = {"model_config": {"window_pattern": pattern, "n_head": 2}}
        arrays = {"transformer.wte.weight": np.ones((64, 32)), "transformer.h.0.attn.c_k.weight": np.ones((32, 32))}
        with pytest.raises(InterchangeError, match="window_pattern"):
            read_config(meta, {**arrays, "resid_lambdas": np.ones(1)}, Path("meta.json"))
    assert not list((Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs").glob("[!.]*")), "a refused import leaves no run"


def test_what_is_missing_or_does_not_belong_together(theirs, hf, tokenizer, base):
    place = theirs / "mid_checkpoints" / "d1"
    with pytest.raises(InterchangeError, match=r"step 9.*\[7\]"):
        run(theirs, step=9)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(base / "nowhere")
    with pytest.raises(InterchangeError, match="neither"):
        run(base)
    other = Tokenizer.train(["entirely different words here"] * 4, 268)
    (theirs / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(other._encoding))
    with pytest.raises(InterchangeError, match=r"token_bytes\.pt"):
        run(theirs)
    (theirs / "tokenizer" / "token_bytes.pt").unlink()
    bigger = Tokenizer.train(["the cat sat on the mat and the bat"] * 4, 275)
    (theirs / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(bigger._encoding))
    with pytest.raises(InterchangeError, match=r"270 tokens, its tokenizer 27\d"):
        run(theirs)
    tokenizer.save(base / "saved")
    folder = run(place, tokenizer=base / "saved" / "tokenizer.json", run_name="x")
    with pytest.raises(InterchangeError, match="already"):
        run(place, tokenizer=base / "saved" / "tokenizer.json", run_name="x")
    assert checkpoint.steps(folder) == [7]
    loose = base / "loose"
    shutil.copytree(place, loose)
    with pytest.raises(InterchangeError, match="--stage"):
        run(loose)
    with pytest.raises(InterchangeError, match="--tokenizer"):
        run(loose, stage="base")
    (hf / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InterchangeError, match="00002"):
        run(hf)
    (hf / "model-00001-of-00004.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InterchangeError, match="00001"):
        run(hf)


def test_among_stages_and_steps_the_latest(theirs):
    place = theirs / "mid_checkpoints" / "d1"
    shutil.copy(place / "model_000007.pt", place / "model_000012.pt")
    later = theirs / "chatsft_checkpoints" / "d1"
    shutil.copytree(place, later)
    found = reference.find_checkpoint(theirs)
    assert found and (found.stage, found.step) == ("sft", 12)
    found = reference.find_checkpoint(theirs, stage="mid", step=7)
    assert found and (found.stage, found.step) == ("mid", 7)
    shutil.copytree(place, theirs / "chatsft_checkpoints" / "d2")
    with pytest.raises(InterchangeError, match="several models"):
        reference.find_checkpoint(theirs)


def test_the_command_line(theirs, capsys):
    assert import_run.main([str(theirs), "--run_name=cli"]) == 0
    assert "python -m scripts.chat --run=cli" in capsys.readouterr().out
    assert import_run.main([]) == 1 and "import_checkpoint PATH" in capsys.readouterr().err
    assert import_run.main(["--run_name", "cli", str(theirs)]) == 1 and "already" in capsys.readouterr().err
    hostile = theirs / "mid_checkpoints" / "d1" / "model_000007.pt"
    hostile.write_bytes(pickle.dumps({"x": 1}))
    assert import_run.main([str(theirs)]) == 1 and "model_000007.pt" in capsys.readouterr().err
