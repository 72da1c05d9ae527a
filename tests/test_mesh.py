"""Meshes data x fsdp x tensor: the same numbers on all of them, and what each of them communicates."""

import jax
import numpy as np
import pytest

from nanochat_jax import sharding
from nanochat_jax.gpt import GPTConfig
from nanochat_jax.optim import OptimHyper, make_optimizer
from nanochat_jax.train_step import abstract_state, init_state, make_train_step, restore_padding, strip_padding

STEPS = 20
# GQA with fewer key/value heads (2) than some meshes have tensor devices (4, 8); stacks that need padding
CONFIG = GPTConfig(sequence_len=32, vocab_size=320, n_layer=2, n_head=8, n_kv_head=2, n_embd=64)


def batch(step: int):
    rng = np.random.default_rng(step % 3)
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 8, CONFIG.sequence_len + 1)).astype(np.int32)
    inputs, targets = tokens[..., :-1], tokens[..., 1:].copy()
    targets[rng.random(targets.shape) < 0.2] = -1
    return inputs, targets, rng.random(targets.shape).astype(np.float32)


def mesh_of(data: int, fsdp: int, tensor: int):
    return sharding.make_mesh(jax.devices()[: data * fsdp * tensor], fsdp, tensor)


def setup(mesh, config=CONFIG):
    optimizer = make_optimizer(OptimHyper(weight_decay=0.1), STEPS, config.n_embd)
    return optimizer, init_state(config, optimizer, mesh, jax.random.key(0)), make_train_step(config, optimizer, mesh)


def losses(*shape: int) -> np.ndarray:
    _, state, step = setup(mesh_of(*shape))
    out = []
    for i in range(STEPS):
        state, metrics = step(state, *batch(i))
        out.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert step._cache_size() == 1, "the training step recompiled"
    return np.array(out)


@pytest.fixture(scope="module")
def single_device():
    out = losses(1, 1, 1)
    assert out[-1, 0] < out[0, 0] - 0.5, "the toy run must learn, or it proves nothing"
    return out


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8), (2, 1, 4), (8, 1, 1), (4, 2, 1)], ids=str)
def test_losses_do_not_depend_on_the_mesh(shape, single_device):
    out = losses(*shape)
    np.testing.assert_allclose(out[:, 0], single_device[:, 0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(out[:, 1], single_device[:, 1], rtol=1e-4)
