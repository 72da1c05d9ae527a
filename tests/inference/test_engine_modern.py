"""The engine on models of the current recipe: the token before, value embeddings, windows, in every way to decode."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.convert.params_reference import params_from_reference
from nanochat_jax.inference import model_runner
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model import gpt
from tests.tokenizer_fixtures import GOLDEN, golden, golden_tokenizer
from tests.toy_params import toy_params


def greedy(engine, prompts, n):
    return [c.tokens for c in engine.generate(prompts, SamplingParams(n, temperature=0.0, ignore_eos=True))]


def test_golden_greedy_streams():
    with np.load(GOLDEN / "tokmodel_modern.npz") as arrays:
        config: dict[str, Any] = {k.split("/")[1]: arrays[k] for k in arrays if k.startswith("config/")}
        pattern = "".join(map(chr, config.pop("window_pattern_codes")))
        config.pop("padded_vocab_size", None)
        sizes = {name: int(size) for name, size in config.items()}
        model = gpt.GPTConfig.modern(**sizes, window_pattern=pattern, smear_across_documents=True)
        names = [k for k in arrays if k.startswith("param/")]
        params = params_from_reference(model, {k.removeprefix("param/"): arrays[k] for k in names})
    cases = golden("engine_modern")["greedy"]
    capacity = max(256, *(len(case["prompt_tokens"]) + case["max_tokens"] for case in cases))
    engine = Engine(model, params, golden_tokenizer(), slots=4, capacity=capacity, steps_per_call=8)
    for case in cases:
        rows = greedy(engine, [case["prompt_tokens"]] * case["num_samples"], case["max_tokens"])
        n = len(case["token_columns"])
        assert [list(column) for column in zip(*rows, strict=True)][:n] == case["token_columns"]


@pytest.fixture(scope="module")
def toy():
    config = gpt.GPTConfig.modern(1024, 300, 3, 4, 2, 32, window_pattern="SL")
    return config, toy_params(config)


@pytest.mark.parametrize("access", ["here's own", "xla", pytest.param("copied", marks=pytest.mark.slow)])
def test_greedy_equals_argmax_of_the_full_forward(toy, access, monkeypatch):
    """Prompts of several chunks, rows in a crowd, prefixes shared with a living request and with a finished one, and
    documents that begin inside a prompt."""
    config, params = toy
    if access != "here's own":
        monkeypatch.setattr(model_runner, "decode_access", lambda config, platform: access)
    engine = Engine(config, params, None, slots=3, capacity=1024, steps_per_call=4)
    rng = np.random.default_rng(0)
    long = rng.integers(0, 290, 700).tolist()
    long[100] = long[511] = long[512] = config.vocab_size - 9
    prompts = [long, long[:600] + [5, 6], long[:513], [7], long[:50] + [8, 9, 10], [1, 2, 3]]
    answers = greedy(engine, prompts, 9) + greedy(engine, [long[:650] + [3]], 9)
    prompts.append(long[:650] + [3])
    ids = np.zeros((len(prompts), 720), np.int32)
    for row, prompt, answer in zip(ids, prompts, answers, strict=True):
        row[: len(prompt) + 9] = prompt + answer
    expected = np.asarray(jax.jit(gpt.forward, static_argnums=0)(config, params, jnp.asarray(ids)))
    for row, prompt, answer in zip(expected, prompts, answers, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 8].argmax(-1).tolist() == answer


def test_scalars_stay_float32(toy):
    """Decoding in bfloat16 casts the weights once, but not the factors that the reference keeps in float32."""
    config, params = toy
    config = gpt.GPTConfig(**{**vars(config), "compute_dtype": "bfloat16"})
    held = Engine(config, params, None, slots=1, capacity=64)._runner.params
    assert held["resid_lambdas"].dtype == jnp.float32
    assert held["h"]["0"]["attn"]["c_q"]["kernel"].dtype == jnp.bfloat16
