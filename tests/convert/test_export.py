"""What is exported is the model: the layout by a second model in NumPy, round trips to the bit, the libraries."""

import dataclasses
import importlib.util
import json
import os
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.convert import InterchangeError, folders, huggingface, import_run, pt_files
from nanochat_jax.convert import export as exporting
from nanochat_jax.convert.chat_template import chat_template
from nanochat_jax.convert.export import ExportSettings, export
from nanochat_jax.convert.import_run import ImportSettings, import_checkpoint
from nanochat_jax.model import gpt
from nanochat_jax.model.config import MODERN
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.runs import checkpoint
from nanochat_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.utils import paths
from tests.toy_params import toy_params
from tests.toy_runs import saved_run, toy_tokenizer

forward = jax.jit(gpt.forward, static_argnums=0)
GROUPED = dict(sequence_len=48, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
PLAIN = dict(sequence_len=48, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Where exports go, beside the base directory."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "ours"))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, 1234 times; it's the bat's hat"] * 4, 300)


def make_run(tokenizer, name="r", stage="sft", sizes=GROUPED, **fields):
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **sizes, **fields)
    meta = {"identity": {"num_iterations": 5, "rows": "ab" * 32}, "settings": {"depth": 2, "model_name": "Ada"}}
    saved_run(name, tokenizer, config, stage, steps=(5,), **meta)
    return config, toy_params(config, 5)


def write(base, to, name="out", **settings):
    return base / name, export(ExportSettings(to=to, out=base / name, **{"check": False, **settings}))


def numpy_forward(config: dict, tensors: dict, ids: np.ndarray) -> np.ndarray:
    """transformers' NanoChat model as its source describes it, from config.json and its tensors; float64."""
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    D, T = config["hidden_size"] // H, len(ids)
    w = {name.removeprefix("model."): np.float64(a) for name, a in tensors.items()}

    def norm(x):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config["rms_norm_eps"])

    angles = np.arange(T)[:, None] * config["rope_parameters"]["rope_theta"] ** (-np.arange(0, D, 2) / D)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[None] for f in (np.cos, np.sin))

    def rotate_half(x):
        return np.concatenate([x[..., D // 2 :], -x[..., : D // 2]], -1)

    x = norm(w["embed_tokens.weight"][ids])
    for i in range(config["num_hidden_layers"]):
        a, y = f"layers.{i}.self_attn.", norm(x)
        q, k, v = (
            (y @ w[f"{a}{n}_proj.weight"].T).reshape(T, heads, D).swapaxes(0, 1)
            for n, heads in (("q", H), ("k", G), ("v", G))
        )
        q, k = (norm(z * cos + rotate_half(z) * sin) for z in (q, k))
        k, v = np.repeat(k, H // G, 0), np.repeat(v, H // G, 0)
        scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(1, 2) / np.sqrt(D), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True)) @ v
        x = x + y.swapaxes(0, 1).reshape(T, -1) @ w[f"{a}o_proj.weight"].T
        x = x + np.maximum(norm(x) @ w[f"layers.{i}.mlp.fc1.weight"].T, 0) ** 2 @ w[f"layers.{i}.mlp.fc2.weight"].T
    z = norm(x) @ w["lm_head.weight"].T
    cap = config["final_logit_softcapping"]
    return cap * np.tanh(z / cap)


@pytest.mark.parametrize("sizes", [GROUPED, PLAIN])
def test_the_layout_is_that_of_transformers(base, tokenizer, sizes):
    config, params = make_run(tokenizer, sizes=sizes, softcap=12.0, rotary_base=5000.0)
    out, _ = write(base, "hf")
    theirs = json.loads((out / "config.json").read_text())
    tensors, _ = huggingface.read_tensors(out)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 40)
    equal = dataclasses.replace(config, rotary_dtype="float32")
    ours = forward(equal, params, jnp.asarray(ids)[None])[0]
    np.testing.assert_allclose(ours, numpy_forward(theirs, tensors, ids), atol=1e-4)
    assert theirs["rms_norm_eps"] == np.finfo(np.float32).eps and theirs["eos_token_id"][0] == tokenizer.vocab_size - 5
    assert out.joinpath("model.safetensors").stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("to", exporting.TARGETS)
def test_round_trips_are_exact_to_the_bit(base, tokenizer, to):
    config, params = make_run(tokenizer)
    out, _ = write(base, to)
    import_checkpoint(ImportSettings(path=out, run_name="back"))
    back_config, back, back_tokenizer, meta = checkpoint.load_model("back")
    assert back_config == config and back_tokenizer.hash == tokenizer.hash
    assert (meta["stage"], meta["step"]) == ("sft", 5)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    if to != "reference":
        assert meta["settings"] == {"depth": 2, "model_name": "Ada"}


@pytest.mark.parametrize("to", exporting.TARGETS)
def test_an_export_in_the_layout_of_the_hubs_cache(base, tokenizer, to):
    """What is downloaded from the hub lies there as links to files that are named by their hashes."""
    make_run(tokenizer)
    out, _ = write(base, to)
    place = base / "hub" / "models--ann--small-sft"
    snapshot = place / "snapshots" / ("c0ffee" * 6)
    (place / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in out.rglob("*") if p.is_file())):
        link = snapshot / file.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place / "blobs" / str(number))
        link.symlink_to(os.path.relpath(place / "blobs" / str(number), link.parent))
    (place / "snapshots" / "older").mkdir()
    folder = import_checkpoint(ImportSettings(path=snapshot))
    assert folder.name == ("d2-sft" if to == "reference" else "ann--small-sft")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(snapshot.name)
    found = import_run.read(ImportSettings(path=place))
    assert all(snapshot in file.parents for file in found.files)
    assert import_run._run_name(place, found) == folder.name
    for name in ("../outside", "/etc/passwd", "a/../../outside", "nowhere"):
        (base / "hub" / "outside").write_text("x")
        (snapshot / "SHA256SUMS").unlink()
        (snapshot / "SHA256SUMS").write_text(f"{paths.sha256_hex(b'x')}  {name}\n")
        with pytest.raises(InterchangeError, match="SHA256SUMS"):
            import_checkpoint(ImportSettings(path=snapshot, run_name="other"))


def test_a_modern_model_goes_to_the_reference_and_back(base, tokenizer):
    config, params = make_run(tokenizer, **{**MODERN, "window_pattern": "SL"}, smear_across_documents=True)
    out, _ = write(base, "reference")
    place = out / "chatsft_checkpoints" / "d2"
    meta = json.loads((place / "meta_000005.json").read_text())
    assert meta["model_config"] == {**GROUPED, "vocab_size": config.vocab_size, "window_pattern": "SL"}
    tensors = pt_files.read(place / "model_000005.pt")
    assert tensors["value_embeds.1.weight"].shape == (config.padded_vocab_size, 16) and len(tensors) == 2 + 6 * 2 + 7
    lengths = pt_files.read(out / "tokenizer" / "token_bytes.pt")
    np.testing.assert_array_equal(lengths, tokenizer.token_bytes(v1_compat=False))
    import_checkpoint(ImportSettings(path=out, run_name="back"))
    back_config, back, _, _ = checkpoint.load_model("back")
    assert back_config == config
    jax.tree.map(np.testing.assert_array_equal, back, params)
    del tensors["smear_lambda"]
    (out / "SHA256SUMS").unlink()
    with open(place / "model_000005.pt", "wb") as file:
        pt_files.write(file, tensors)
    with pytest.raises(InterchangeError, match="missing smear_lambda"):
        import_checkpoint(ImportSettings(path=out, run_name="partly"))


def test_the_references_files(base, tokenizer):
    config, _ = make_run(tokenizer)
    out, _ = write(base, "reference")
    place = out / "chatsft_checkpoints" / "d2"
    meta = json.loads((place / "meta_000005.json").read_text())
    assert meta["model_config"] == {**GROUPED, "vocab_size": config.vocab_size} and meta["user_config"]["depth"] == 2
    tensors = pt_files.read(place / "model_000005.pt")
    assert tensors["transformer.h.1.attn.c_k.weight"].shape == (16, 32) and len(tensors) == 2 + 6 * 2
    assert pickle.loads((out / "tokenizer" / "tokenizer.pkl").read_bytes()).n_vocab == config.vocab_size
    lengths = pt_files.read(out / "tokenizer" / "token_bytes.pt")
    np.testing.assert_array_equal(lengths, tokenizer.token_bytes(v1_compat=True))


def test_large_models_are_written_in_shards(tmp_path):
    arrays = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    huggingface.write_tensors(tmp_path, arrays, max_shard_bytes=900)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    back, _ = huggingface.read_tensors(tmp_path)
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())
    assert json.loads((tmp_path / huggingface.INDEX).read_text())["metadata"]["total_size"] == 2000


@pytest.mark.parametrize(
    ("to", "fields", "reason"),
    [
        ("hf", {"window_pattern": "SL"}, "window"),
        ("reference", {"window_pattern": "SL"}, "window"),
        ("reference", {"rotary_dtype": "float32"}, "rotary_dtype"),
        ("reference", {"softcap": 30.0}, "softcap"),
        ("reference", {"rotary_base": 1e5}, "rotary_base"),
        ("hf", {"smear": True}, "smear"),
        ("hf", {"vocab_multiple": 64}, "vocab_multiple"),
        ("reference", {**MODERN, "backout": False}, "backout"),
        ("reference", {"value_embeds": True}, "rotary_base"),
    ],
)
def test_what_the_target_cannot_express_is_refused_with_the_reason(base, tokenizer, to, fields, reason):
    make_run(tokenizer, **fields)
    with pytest.raises(InterchangeError, match=f"{to}.*{reason}"):
        write(base, to)
    assert not (base / "out").exists()


def test_a_full_folder_is_not_touched_unless_asked_and_then_only_an_export(base, tokenizer, monkeypatch):
    make_run(tokenizer)
    out, _ = write(base, "hf")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InterchangeError, match="--overwrite"):
        write(base, "hf")

    def broken(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_tensors", broken)
        with pytest.raises(OSError, match="No space"):
            write(base, "hf", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    write(base, "safetensors", overwrite=True)
    assert not (out / "config.json").exists() and sorted(p.name for p in base.iterdir()) == ["ours", "out"]
    (base / "mine").mkdir()
    (base / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InterchangeError, match="mine"):
        write(base, "hf", name="mine", overwrite=True)
    assert (base / "mine" / "thesis.txt").exists()


def test_hashes_find_damage(base, tokenizer):
    make_run(tokenizer)
    out, _ = write(base, "hf")
    folders.verify(out)
    listed = {line.split("  ")[1] for line in (out / folders.SUMS).read_text().splitlines()}
    assert listed == {p.name for p in out.iterdir()} - {folders.SUMS}
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(InterchangeError, match=r"model\.safetensors"):
        import_checkpoint(ImportSettings(path=out))


def test_the_card_and_the_files_around_the_model(base, tokenizer):
    make_run(tokenizer)
    out, _ = write(base, "hf")
    card = (out / "README.md").read_text()
    for part in ("bfloat16", "step 5", tokenizer.hash, "ab" * 32):
        assert part in card, part
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<|bos|>" and settings["eos_token"] == "<|assistant_end|>"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.encode_special("<|assistant_end|>"), tokenizer.bos_id]
    make_run(tokenizer, "b", stage="base")
    out, _ = write(base, "hf", name="b", run="b")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|bos|>" and "chat_template" not in settings


# --- the chat template ----------


def conversations():
    rng = np.random.default_rng(0)
    words = ["the", " cat", "  ", "\n", "123", "é", "你好", "it's", "<|", "|>", "bos", "\t", "{{ x }}", "{% if %}", ""]
    text = lambda: "".join(rng.choice(words, rng.integers(0, 9)))  # noqa: E731
    for i in range(50):
        messages = [{"role": "system", "content": text()}] if i % 3 == 0 else []
        for turn in range(rng.integers(1, 5)):
            parts = [("text", text()), ("python", "1+1"), ("python_output", "2"), ("text", " so"), ("text", "")]
            content = [{"type": kind, "text": t} for kind, t in parts] if (i + turn) % 2 else text()
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": content}]
        yield messages[: len(messages) - (i % 5 == 0)]


def rendered(tokenizer, messages, **more) -> list[int]:
    """The template through Jinja as transformers sets it up, its special tokens then read as such."""
    jinja2 = pytest.importorskip("jinja2")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(chat_template(list(tokenizer.special_tokens)))
    return tokenizer._encoding.encode(template.render(messages=messages, **more), allowed_special="all")


def test_the_template_renders_fifty_conversations_as_we_do(tokenizer):
    for messages in conversations():
        ours, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=10**6)
        assert rendered(tokenizer, messages) == ours
        if messages[-1]["role"] == "assistant":
            prompt = rendered(tokenizer, messages[:-1], add_generation_prompt=True)
            assert prompt == tokenizer.render_for_completion({"messages": messages}, max_tokens=10**6)


def test_the_template_refuses_what_text_cannot_say(tokenizer):
    jinja2 = pytest.importorskip("jinja2")
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    two = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    bad = [[], [answer], [user, user], [user, {"role": "tool", "content": "x"}], [{"role": "system", "content": "x"}]]
    bad += [[user, two], [{"role": "user", "content": None}], [{"role": "user", "content": [user]}]]
    bad += [[user, answer, {"role": "system", "content": "x"}]]
    bad += [[{"role": "user", "content": f"say {name} now"}] for name in SPECIAL_TOKENS]
    for messages in bad:
        with pytest.raises(jinja2.TemplateError):
            rendered(tokenizer, messages)


# --- with the targets' own libraries ----------


@pytest.mark.slow
@pytest.mark.parametrize(("to", "library"), [("hf", "transformers"), ("reference", "torch"), ("safetensors", "torch")])
def test_the_targets_library_agrees_or_is_said_to_be_missing(base, tokenizer, capsys, to, library):
    make_run(tokenizer)
    out, found = write(base, to, check=True)
    said = capsys.readouterr().out
    if not all(map(importlib.util.find_spec, (library, "torch"))):
        assert "missing" in found and "is not installed here" in said
        return
    assert found["max_diff_equal_tables"] < 1e-4 and found["greedy"] == 5
    assert "greedy continuations" in said and "equal tables" in said
    if to != "hf":
        assert found["greedy_agree"] == 5
    else:
        assert found["texts_identical"] == found["texts"] > 0 and found["chats_identical"] == found["chats"] > 0


@pytest.mark.slow
def test_a_model_that_the_library_computes_otherwise_is_not_written(base, tokenizer, monkeypatch):
    pytest.importorskip("torch")
    make_run(tokenizer)
    wrong = exporting.params_to_reference

    def transposed(config, params):
        arrays = wrong(config, params)
        name = "transformer.h.0.attn.c_q.weight"
        return arrays | {name: arrays[name].T}

    monkeypatch.setattr(exporting, "params_to_reference", transposed)
    with pytest.raises(InterchangeError, match="logits differ"):
        write(base, "reference", check=True)
    assert not (base / "out").exists()


@pytest.mark.slow
def test_an_imported_model_is_evaluated_and_finetuned_as_our_own(base, capsys):
    from nanochat_jax.evals import run as evaluation
    from nanochat_jax.stages.main import main

    make_run(toy_tokenizer(), "home", stage="mid", sizes={**PLAIN, "sequence_len": 192})
    out, _ = write(base, "reference", run="home")
    shutil.rmtree(checkpoint.run_dir("home"))
    import_checkpoint(ImportSettings(path=out, run_name="guest-mid"))
    assert evaluation.main(["--source=mid", "--tasks=world/arithmetic", "--max_problems=2", "--max_new_tokens=8"]) == 0
    flags = ["--total_batch_size=1536", "--num_iterations=2", "--eval_tokens=2048", "--metrics_max_problems=8"]
    assert main(["--stage=sft", "--demo", "--device=cpu", "--device_batch_size=1", *flags]) == 0
    assert "sft starts from guest-mid, step 5" in capsys.readouterr().out
    meta = checkpoint.load_meta(checkpoint.run_dir("guest-sft"))
    assert meta["parent"] == {"run": "guest-mid", "step": 5, "stage": "mid"} and meta["step"] == 2
    assert {"config", "tokenizer_hash", "identity", "code"} <= meta.keys() and len(meta["code"]["sha256"]) == 64


def test_without_the_library_it_is_said_that_nothing_was_checked(base, tokenizer, monkeypatch, capsys):
    make_run(tokenizer)
    monkeypatch.setattr(exporting, "check", lambda *_: {"missing": "transformers"})
    out, _ = write(base, "hf", check=True)
    assert "not checked" in capsys.readouterr().out and "not loaded" in (out / "README.md").read_text()


def test_the_command_line(base, tokenizer, capsys):
    make_run(tokenizer)
    assert exporting.main(["--to=hf", str(base / "o1"), "--run=r", "--check=False"]) == 0
    assert exporting.main(["--to", "hf", "--check=False", "--overwrite", str(base / "o1")]) == 0
    assert exporting.main(["--to=hf", "--check=False", str(base / "o1")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert exporting.main(["--to=hf"]) == 1 and "OUT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        exporting.main(["--to=gguf", str(base / "o2")])
