"""What `import nanochat_jax` offers, and that it costs nothing before it is used."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import nanochat_jax
from nanochat_jax.inference.engine import Engine
from nanochat_jax.model.parameters import abstract
from nanochat_jax.runs import checkpoint
from nanochat_jax.text.tokenizer import Tokenizer
from tests import children
from tests.tokenizer_fixtures import golden_tokenizer
from tests.toy_params import toy_params

HEAVY = ("jax", "flax", "optax", "orbax", "numpy", "rustbpe")


def test_importing_the_package_imports_no_library():
    program = "import sys, nanochat_jax; print(*{name.partition('.')[0] for name in sys.modules})"
    done = children.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)


def test_every_name_is_there():
    for name in nanochat_jax.__all__:
        assert getattr(nanochat_jax, name) is not None
    assert set(nanochat_jax.__all__) <= set(dir(nanochat_jax))
    assert nanochat_jax.Engine is Engine and nanochat_jax.Tokenizer is Tokenizer
    assert nanochat_jax.__version__ == importlib.metadata.version("nanochat_jax")
    with pytest.raises(AttributeError, match="nanochat_jax.*Transformer"):
        _ = nanochat_jax.Transformer  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(str(nanochat_jax.__file__)).read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"nanochat_jax.{home}" for name, home in nanochat_jax._HOMES.items()}
    assert set(nanochat_jax.__all__) == seen.keys() | {"__version__"}


def test_a_run_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = golden_tokenizer()
    config = nanochat_jax.GPTConfig(
        sequence_len=16, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16
    )
    params = toy_params(config)
    run = checkpoint.run_dir("mine")
    run.mkdir(parents=True)
    tokenizer.save(run)
    meta = {"stage": "base", "tokenizer_hash": tokenizer.hash, "config": checkpoint.config_to_dict(config)}
    checkpoint.save(run, 3, {"params": params}, meta)
    for model in (nanochat_jax.load("mine"), nanochat_jax.load(), nanochat_jax.load(stage="base", step=3)):
        assert model.config == config and model.tokenizer.hash == tokenizer.hash
        assert (model.meta["step"], model.meta["run"]) == (3, "mine")
        jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert jax.tree.structure(model.params) == jax.tree.structure(abstract(config))
    with pytest.raises(checkpoint.CheckpointError, match="yours"):
        nanochat_jax.load("yours")
