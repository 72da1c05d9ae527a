"""The training step over a mesh: same numbers on any number of devices, one reduction, donation, accumulation."""

import re

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, abstract
from nanochat_jax.parallel import sharding
from nanochat_jax.training.optim import OptimHyper, group, make_optimizer
from nanochat_jax.training.step import abstract_state, make_train_step, restore_padding, state_of, strip_padding
from tests.toy_params import toy_params

STEPS = 20
# GQA with fewer key/value heads (2) than some meshes of test_mesh.py have tensor devices (4, 8); stacks (of 4, 4, 2, 2
# matrices) that need padding on 8 devices. Shared with test_mesh.py, so that the same programs serve both.
CONFIG = GPTConfig(sequence_len=32, vocab_size=320, n_layer=2, n_head=8, n_kv_head=2, n_embd=64)
HYPER = OptimHyper(weight_decay=0.1)


def batch(step: int, accumulation: int = 2, rows: int = 8):
    rng = np.random.default_rng(step % 3)
    tokens = rng.integers(0, CONFIG.vocab_size, (accumulation, rows, CONFIG.sequence_len + 1)).astype(np.int32)
    inputs, targets = tokens[..., :-1], tokens[..., 1:].copy()
    targets[rng.random(targets.shape) < 0.2] = -1
    return inputs, targets, rng.random(targets.shape).astype(np.float32)


def setup(n_devices: int, steps: int = STEPS):
    mesh = sharding.make_mesh(jax.devices()[:n_devices])
    optimizer = make_optimizer(HYPER, steps, CONFIG.n_embd)
    state = state_of(CONFIG, toy_params(CONFIG), optimizer, mesh)
    return mesh, optimizer, state, make_train_step(CONFIG, optimizer, mesh)


def losses(n_devices: int) -> np.ndarray:
    _, _, state, step = setup(n_devices)
    out = []
    for i in range(STEPS):
        state, metrics = step(state, *batch(i))
        out.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "the training step recompiled"
    return np.array(out)


@pytest.fixture(scope="module")
def single_device_losses():
    return losses(1)


@pytest.mark.parametrize("n_devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_losses_do_not_depend_on_the_number_of_devices(n_devices, single_device_losses):
    assert single_device_losses[-1] < single_device_losses[0] - 0.5, "the toy run must learn, or it proves nothing"
    np.testing.assert_allclose(losses(n_devices), single_device_losses, atol=1e-5, rtol=0)


def collectives(hlo: str) -> list[tuple[str, str]]:
    """(computation, kind) of every array that a collective of compiled HLO text moves; XLA may combine several."""
    out, computation = [], ""
    for line in hlo.splitlines():
        if m := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            computation = "ENTRY" if m[1] else m[2]
        kinds = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"
        if m := re.search(rf" = .*?\b({kinds})(-start)?\(([^)]*)\)", line):
            out += [(computation, m[1])] * m[3].count("%")
    return out


def test_one_reduction_per_gradient_outside_the_accumulation_loop():
    _, _, state, step = setup(8)
    compiled = step.lower(state, *batch(0)).compile()  # the program of the test above
    text = compiled.as_text()
    assert " while(" in text, "accumulation should be a loop"
    found = collectives(text)
    assert {where for where, _ in found} == {"ENTRY"}, f"a collective runs inside a loop or branch: {found}"
    kinds = [kind for _, kind in found]
    tensors = len(jax.tree.leaves(jax.eval_shape(lambda p: group(CONFIG, p), abstract(CONFIG))))
    assert kinds.count("reduce-scatter") == tensors
    assert kinds.count("all-gather") == tensors
    assert kinds.count("all-to-all") == kinds.count("collective-permute") == 0
    scalar = [line for line in text.splitlines() if re.search(r"\ball-reduce(-start)?\(", line)]
    assert all(re.match(r".*= (f32\[\]|\((f32\[\](, )?(/\*index=\d+\*/)?)+\)) all-reduce", s) for s in scalar), scalar


def test_optimizer_state_is_sharded_over_the_devices_and_buffers_are_donated():
    _, _, state, step = setup(8)
    for name, leaf in (
        ("stack", state.opt_state.muon.momentum["64x64"]),
        ("adam", state.opt_state.adam.mu["embedding"]),
    ):
        shard = leaf.addressable_shards[0].data
        assert shard.nbytes * 8 == leaf.nbytes, f"{name} is not sharded over eight"
    compiled = step.lower(state, *batch(0)).compile()
    state_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    old = state.params["wte"]["embedding"]
    step(state, *batch(0))
    assert old.is_deleted()


@pytest.mark.slow
def test_accumulation_does_not_change_the_step():
    inputs, targets, weights = batch(1, accumulation=1, rows=16)
    results = []
    for accumulation in (1, 2, 8):
        _, _, state, step = setup(2)
        micro = [a.reshape(accumulation, 16 // accumulation, -1) for a in (inputs, targets, weights)]
        for _ in range(2):
            state, metrics = step(state, *micro)
        results.append(
            (float(metrics["loss"]), float(metrics["grad_norm"]), np.asarray(state.params["wte"]["embedding"]))
        )
    for loss, norm, embedding in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5
        assert abs(norm - results[0][1]) < 1e-4
        np.testing.assert_allclose(embedding, results[0][2], atol=2e-4)


def test_no_weight_at_all_is_a_zero_loss_and_a_finite_state():
    _, _, state, step = setup(8)
    inputs, targets, weights = batch(0)
    state, metrics = step(state, inputs, np.full_like(targets, -1), weights)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_devices(single_device_losses):
    out = []
    mesh, optimizer, state, step = setup(8)
    for devices, first, last in ((8, 0, 7), (2, 7, 13), (8, 13, STEPS)):
        if first:
            stored = strip_padding(state, abstract_state(CONFIG, optimizer, mesh, padded=False))
            stored = jax.tree.map(np.asarray, stored)
            mesh, optimizer, _, step = setup(devices)
            state = restore_padding(stored, abstract_state(CONFIG, optimizer, mesh))
        for i in range(first, last):
            state, metrics = step(state, *batch(i))
            out.append(float(metrics["loss"]))
    np.testing.assert_allclose(out, single_device_losses, atol=1e-5, rtol=0)
