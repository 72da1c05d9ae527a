"""The modern recipe over meshes: same numbers as on one device, collectives as in v1, second moments sharded."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from nanochat_jax.model.config import MODERN
from nanochat_jax.parallel import sharding
from nanochat_jax.training.optim import OptimHyper, adamw_members, make_optimizer, stack_members
from nanochat_jax.training.step import abstract_state, make_train_step, restore_padding, state_of, strip_padding
from tests.parallel.test_mesh import CONFIG as V1_CONFIG
from tests.parallel.test_mesh import STEPS, batch, collectives, mesh_of
from tests.toy_params import toy_params

CONFIG = dataclasses.replace(V1_CONFIG, **MODERN)
# Rates that a batch this small can bear: at full ones the loss jumps about, and rounding grows up to 1e-5.
RATES = dict(embedding_lr=0.09, unembedding_lr=0.0024, matrix_lr=0.006, scalar_lr=0.15)
HYPER = OptimHyper.of("modern", **RATES, warmup_steps=4, momentum_warmup=10)


def setup(*shape: int) -> Any:
    mesh = mesh_of(*shape)
    optimizer = make_optimizer(HYPER, STEPS, CONFIG.n_embd)
    state = state_of(CONFIG, toy_params(CONFIG), optimizer, mesh)
    return mesh, optimizer, state, make_train_step(CONFIG, optimizer, mesh, grad_clip=0.0)


def train(state, step, steps):
    out = []
    for i in steps:
        state, metrics = step(state, *batch(i))
        out.append(float(metrics["loss"]))
    return state, out


@pytest.fixture(scope="module")
def single_device():
    _, _, state, step = setup(1, 1, 1)
    state, losses = train(state, step, range(STEPS))
    assert losses[-1] < losses[0] - 0.5, "the toy run must learn, or it proves nothing"
    return losses


SHAPES = [(8, 1, 1), (2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 8, 1), (1, 1, 8)))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_do_not_depend_on_the_mesh(shape, single_device):
    _, _, state, step = setup(*shape)
    _, losses = train(state, step, range(STEPS))
    assert step._cache_size() == 1, "the training step recompiled"
    np.testing.assert_allclose(losses, single_device, atol=1e-5, rtol=0)


def test_one_reduction_and_one_gathering_per_stack_and_moments_with_their_stacks():
    _, _, state, step = setup(8, 1, 1)
    text = step.lower(state, *batch(0)).compile().as_text()
    found = collectives(text)
    assert {where for where, _ in found} == {"ENTRY"}, f"a collective runs inside a loop or branch: {found}"
    kinds = [kind for _, kind in found]
    adamw = jax.tree.leaves(adamw_members(CONFIG))
    large = [leaf for leaf in adamw if sharding.dimension(leaf.kind, sharding.FSDP) is not None]
    assert kinds.count("reduce-scatter") == kinds.count("all-gather") == len(stack_members(CONFIG)) + len(large)
    assert len(adamw) - len(large) == 5, "scalars and the smear gate are summed everywhere"
    assert kinds.count("all-to-all") == kinds.count("collective-permute") == 0
    moments = state.opt_state.muon.second_moment
    assert {name: m.shape for name, m in moments.items()} == {
        "12x2": (8, 12, 1),
        "64x64": (8, 1, 64),
        "64x16": (8, 64, 1),
        "64x256": (8, 1, 256),
        "256x64": (8, 256, 1),
    }
    assert all(m.addressable_shards[0].data.shape[0] == 1 for m in moments.values())


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(single_device):
    """Second moments are stored without their padding, like everything else."""
    mesh, optimizer, state, step = setup(8, 1, 1)
    state, losses = train(state, step, range(9))
    stored = strip_padding(state, abstract_state(CONFIG, optimizer, mesh, padded=False))
    assert stored.opt_state.muon.second_moment["64x256"].shape == (2, 1, 256)
    mesh, optimizer, _, step = setup(1, 2, 2)
    state = restore_padding(jax.tree.map(np.asarray, stored), abstract_state(CONFIG, optimizer, mesh))
    _, more = train(state, step, range(9, STEPS))
    np.testing.assert_allclose(losses + more, single_device, atol=1e-5, rtol=0)


def test_a_rejected_step_decays_nothing():
    _, _, state, step = setup(8, 1, 1)
    before = jax.tree.map(np.asarray, state.params)
    inputs, targets, weights = batch(0)
    state, metrics = step(state, inputs, targets, np.full_like(weights, np.nan))
    assert float(metrics["accepted"]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.params), before)
