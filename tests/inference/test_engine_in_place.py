"""The engine as it decodes on a GPU, on a CPU: tokens written into the slots at once, one program for all lengths. Its
streams are those of the other ways to decode, whatever happens to a slot."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.inference import model_runner
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model import gpt
from nanochat_jax.model.joined_qkv import join_qkv, part_qkv
from nanochat_jax.model.kv_in_place import formula
from tests.tokenizer_fixtures import golden_tokenizer
from tests.toy_params import toy_params

TOKENIZER = golden_tokenizer()
V = TOKENIZER.vocab_size
MODELS = {
    "v1 mqa": gpt.GPTConfig(256, V, 2, 4, 1, 32),
    "modern gqa": gpt.GPTConfig.modern(256, V, 3, 4, 2, 32, window_pattern="SL"),  # windows of 128
}


def prompt_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


def streams(config: gpt.GPTConfig, access: str | None, monkeypatch) -> list[tuple[Any, ...]]:
    """What an engine of four slots says to a mixture of requests, and how many tokens of each it did not prefill."""
    with monkeypatch.context() as patch:
        if access:
            patch.setattr(model_runner, "decode_access", lambda config, platform: access)
        engine = Engine(config, toy_params(config), TOKENIZER, slots=4, capacity=700, steps_per_call=4)
    greedy, drawn = SamplingParams(11, temperature=0.0), SamplingParams(9, temperature=1.0, top_k=40, ignore_eos=True)
    call = (TOKENIZER.encode_special("<|python_start|>"), *b"12*3", TOKENIZER.encode_special("<|python_end|>"))
    system = prompt_of(0, 530)  # more than a chunk, and than two windows
    waves = [
        # 1. A prefix that two others wait for, samples of one prompt, a call of the calculator in the middle of a call
        #    of the program, and rows that stop before the others.
        [
            (system + prompt_of(1, 30), greedy),
            (system + prompt_of(2, 3), replace(drawn, max_tokens=5)),
            (prompt_of(3, 90), drawn),
            (prompt_of(3, 90), replace(drawn, sample_index=1, logprobs=2)),
            (prompt_of(4, 40), replace(greedy, begin=call, max_tokens=30)),
            ([7], SamplingParams(150, temperature=0.0, ignore_eos=True)),  # beyond the window
        ],
        # 2. A prefix of a finished request, copied; and a prompt that only fills a chunk partly.
        [(system + prompt_of(5, 20), greedy), (prompt_of(6, 65), replace(greedy, stop=("e", "a", "t")))],
    ]
    found = []
    for wave in waves:
        requests = [engine.submit(*request) for request in wave]
        while engine.live:
            engine.step()
        found += [(r.tokens, r.masks, r.reused) for r in requests]
    # 3. The next turn of a conversation, in the slot of the last.
    turn = engine.submit([*requests[0].prompt, *requests[0].tokens, 9, 9], greedy)
    while engine.live:
        engine.step()
    return [*found, (turn.tokens, turn.masks, turn.reused)]


@pytest.mark.parametrize("name", MODELS)
def test_streams_equal_those_of_the_other_path(name, monkeypatch):
    ours, other = (streams(MODELS[name], access, monkeypatch) for access in ("xla", None))
    assert ours == other
    reused = [n for *_, n in ours]
    assert reused[1] == 530 and reused[3] == 89 and reused[6] == 530 and reused[8] > 550
    assert 0 in ours[4][1], "the calculator's answer was not forced"


def test_attention_of_a_token_is_that_of_jax_with_lengths():
    """Which has the same meaning on a GPU, by cuDNN; what lies beyond the lengths does not matter."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, n, m, 16)), jnp.float32) for n, m in ((2, 2), (2, 40), (2, 40)))
    seen = jnp.array([1, 17, 40])
    row = [x.reshape(6, -1, 1, 16) for x in (q, k, v)]
    expected = jax.nn.dot_product_attention(*row, key_value_seq_lengths=jnp.repeat(seen, 2)).reshape(q.shape)
    np.testing.assert_allclose(formula(q, k, v, seen), expected, atol=2e-6)
    beyond = jnp.arange(40)[None, None, :, None] >= seen[:, None, None, None]
    far = (jnp.where(beyond, 1e4, x) for x in (k, v))
    np.testing.assert_array_equal(formula(q, *far, seen), formula(q, k, v, seen))


@pytest.mark.parametrize("name", MODELS)
def test_joined_parameters_are_the_same_ones(name):
    params = toy_params(MODELS[name])
    assert "c_q" not in join_qkv(params)["h"]["0"]["attn"]
    jax.tree.map(np.testing.assert_array_equal, part_qkv(MODELS[name], join_qkv(params)), params)


def test_one_program_decodes_and_warming_up_leaves_nothing_to_compile(monkeypatch):
    """On two devices, whose streams are those of one."""
    config, prompts = MODELS["v1 mqa"], [prompt_of(i, n) for i, n in enumerate((1, 20, 50))]
    settings, greedy = dict(capacity=60, steps_per_call=4), SamplingParams(9, temperature=0.0)
    expected = Engine(config, toy_params(config), TOKENIZER, slots=3, **settings).generate(prompts, greedy)
    monkeypatch.setattr(model_runner, "decode_access", lambda config, platform: "xla")
    devices = jax.devices()[:2]
    engine = Engine(config, toy_params(config), TOKENIZER, slots=4, devices=devices, **settings)
    before = model_runner.decode._cache_size()
    assert engine.warm_up() <= 9 and model_runner.decode._cache_size() == before + 1
    compiled = model_runner.compiled_programs()
    assert [c.tokens for c in engine.generate(prompts, greedy)] == [c.tokens for c in expected]
    assert model_runner.compiled_programs() == compiled
