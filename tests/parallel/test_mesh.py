"""Meshes data x fsdp x tensor: the same numbers on all of them, what each communicates, holds and refuses."""

import dataclasses
import re
from collections import Counter

import jax
import numpy as np
import pytest

from nanochat_jax.model.gpt import GPTConfig, abstract
from nanochat_jax.parallel import sharding
from nanochat_jax.training.optim import OptimHyper, group, make_optimizer
from nanochat_jax.training.step import abstract_state, make_train_step, restore_padding, state_of, strip_padding
from tests.toy_params import toy_params

STEPS = 20
# GQA with fewer key/value heads (2) than some meshes have tensor devices (4, 8); stacks (of 4, 4, 2, 2 matrices) that
# need padding on 8 devices
CONFIG = GPTConfig(sequence_len=32, vocab_size=320, n_layer=2, n_head=8, n_kv_head=2, n_embd=64)
OPTIMIZER = make_optimizer(OptimHyper(weight_decay=0.1), STEPS, CONFIG.n_embd)


def mesh_of(data: int, fsdp: int = 1, tensor: int = 1):
    return sharding.make_mesh(jax.devices()[: data * fsdp * tensor], fsdp, tensor)


def setup(mesh, config=CONFIG):
    """A trained-looking state on the mesh, and the step that goes with it."""
    return state_of(config, toy_params(config), OPTIMIZER, mesh), make_train_step(config, OPTIMIZER, mesh)


def batch(step: int, accumulation: int = 2, rows: int = 8, config=CONFIG):
    """Inputs, targets (some ignored) and uneven weights; three batches take turns."""
    rng = np.random.default_rng(step % 3)
    tokens = rng.integers(0, config.vocab_size, (accumulation, rows, config.sequence_len + 1)).astype(np.int32)
    inputs, targets = tokens[..., :-1], tokens[..., 1:].copy()
    targets[rng.random(targets.shape) < 0.2] = -1
    return inputs, targets, rng.random(targets.shape).astype(np.float32)


def losses(*shape: int) -> np.ndarray:
    state, step = setup(mesh_of(*shape))
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


SHAPES = [(8, 1, 1), (2, 2, 2)]
MORE = [(2, 1, 1), (4, 1, 1), (1, 8, 1), (1, 1, 8), (2, 1, 4), (4, 2, 1)]


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE)], ids=str)
def test_losses_do_not_depend_on_the_mesh(shape, single_device):
    out = losses(*shape)
    np.testing.assert_allclose(out[:, 0], single_device[:, 0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(out[:, 1], single_device[:, 1], rtol=1e-4)


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(single_device):
    mesh = mesh_of(8)
    state, step = setup(mesh)
    out = []
    for shape, first, last in (((8, 1, 1), 0, 5), ((1, 2, 1), 5, 10), ((2, 2, 2), 10, 15), ((8, 1, 1), 15, STEPS)):
        if first:
            stored = strip_padding(state, abstract_state(CONFIG, OPTIMIZER, mesh, padded=False))
            mesh = mesh_of(*shape)
            _, step = setup(mesh)
            state = restore_padding(jax.tree.map(np.asarray, stored), abstract_state(CONFIG, OPTIMIZER, mesh))
        for i in range(first, last):
            state, metrics = step(state, *batch(i))
            out.append(float(metrics["loss"]))
    np.testing.assert_allclose(out, single_device[:, 0], atol=1e-5, rtol=0)


def test_accumulation_does_not_change_the_step():
    """One micro-batch of 16 rows and eight of 2, uneven weights: the first step's loss and gradient, and what two steps
    make of the parameters. The second loss is of parameters that differ by rounding, so it says nothing more."""
    small = GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
    inputs, targets, weights = batch(1, accumulation=1, rows=16, config=small)
    results = []
    for accumulation in (1, 8):
        state, step = setup(mesh_of(2), small)
        micro = [a.reshape(accumulation, 16 // accumulation, -1) for a in (inputs, targets, weights)]
        state, metrics = step(state, *micro)
        state, _ = step(state, *micro)
        results.append((metrics["loss"], metrics["grad_norm"], state.params["wte"]["embedding"]))
    for a, b, tolerance in zip(*results, (1e-6, 1e-5, 2e-5), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_no_weight_at_all_is_a_zero_loss_and_a_finite_state():
    state, step = setup(mesh_of(8))
    inputs, targets, weights = batch(0)
    state, metrics = step(state, inputs, np.full_like(targets, -1), weights)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


# ---------------------------------------------------------------------------------------------------------------------
# what is communicated and held


def lowered_step(mesh):
    state = abstract_state(CONFIG, OPTIMIZER, mesh)
    return state, make_train_step(CONFIG, OPTIMIZER, mesh).lower(state, *batch(0))


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


GROUPS = len(jax.tree.leaves(jax.eval_shape(lambda p: group(CONFIG, p), abstract(CONFIG))))
STACKS = GROUPS - 2


def local_bytes(tree) -> int:
    return sum(np.prod(a.sharding.shard_shape(a.shape), dtype=int) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def counts(compiled) -> tuple[Counter, Counter]:
    """Arrays moved once per step and inside the accumulation loop, by kind."""
    found = collectives(compiled.as_text())
    once, in_loop = ([kind for where, kind in found if (where == "ENTRY") is outside] for outside in (True, False))
    return Counter(once), Counter(in_loop)


def test_data_reduces_every_gradient_once_outside_the_accumulation_loop():
    state, lowered = lowered_step(mesh_of(8))
    compiled = lowered.compile()  # the program of the tests above
    text = compiled.as_text()
    once, in_loop = counts(compiled)
    assert " while(" in text, "accumulation should be a loop"
    assert not in_loop and once["reduce-scatter"] == once["all-gather"] == GROUPS
    assert once["all-to-all"] == once["collective-permute"] == 0
    reduced = [line for line in text.splitlines() if re.search(r"\ball-reduce(-start)?\(", line)]
    assert all(re.match(r".*= (f32\[\]|\((f32\[\](, )?(/\*index=\d+\*/)?)+\)) all-reduce", s) for s in reduced), reduced
    assert compiled.memory_analysis().alias_size_in_bytes >= local_bytes(state), "a buffer of the state is not donated"


@pytest.mark.slow
def test_fsdp_gathers_every_layer_twice_and_reduces_once():
    state, lowered = lowered_step(mesh_of(4, 2, 1))
    # forward and again backward, but for the two embeddings, which the backward pass does not need. Counted before
    # compiling: on CPU XLA drops the barriers between the two and gathers once.
    assert lowered.as_text().count("stablehlo.all_gather") == 2 * 6 * CONFIG.n_layer + 2 + GROUPS
    compiled = lowered.compile()
    once, in_loop = counts(compiled)
    assert set(in_loop) <= {"all-gather"}, "a reduction runs inside the accumulation loop"
    assert once["reduce-scatter"] == GROUPS
    assert once["all-to-all"] == 2 * STACKS, "updates of stacks are taken apart once (two parts)"
    assert local_bytes(state.params) * 2 == sum(a.size * 4 for a in jax.tree.leaves(abstract(CONFIG)))
    assert compiled.memory_analysis().alias_size_in_bytes >= local_bytes(state), "a buffer of the state is not donated"


@pytest.mark.slow
def test_tensor_sums_once_per_attention_and_mlp_in_each_direction():
    state, lowered = lowered_step(mesh_of(4, 1, 2))
    compiled = lowered.compile()
    once, in_loop = counts(compiled)
    # besides: the embedding, two numbers per token within the loss, the gradient of the hidden states
    assert in_loop == {"all-reduce": 4 * CONFIG.n_layer + 4}
    assert once["reduce-scatter"] == once["all-gather"] == GROUPS
    assert once["all-to-all"] == 2 * 2 * STACKS, "put together for Newton-Schulz and taken apart after it (two parts)"
    assert compiled.memory_analysis().alias_size_in_bytes >= local_bytes(state), "a buffer of the state is not donated"


@pytest.mark.parametrize("depth", [20, pytest.param(26, marks=pytest.mark.slow), 32])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 8, 1)], ids=str)
def test_each_of_eight_devices_holds_an_eighth_of_the_optimizer_state(depth, shape):
    config = GPTConfig.from_depth(depth, 65536, 2048)
    optimizer, mesh = make_optimizer(OptimHyper(), 1, config.n_embd), mesh_of(*shape)
    full = abstract_state(config, optimizer, mesh, padded=False).opt_state
    total = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(full))
    assert local_bytes(abstract_state(config, optimizer, mesh).opt_state) <= (1 / 8 + 0.02) * total


# ---------------------------------------------------------------------------------------------------------------------
# what does not go


def test_a_mesh_that_does_not_fit_names_the_flag():
    with pytest.raises(ValueError, match="--fsdp=3"):
        sharding.make_mesh(fsdp=3)
    three_heads = dataclasses.replace(CONFIG, n_head=3, n_kv_head=3, n_embd=96)
    with pytest.raises(ValueError, match="--tensor=2 .*heads.* 3"):
        make_train_step(three_heads, OPTIMIZER, mesh_of(4, 1, 2))
    with pytest.raises(ValueError, match="--tensor=2 .*vocabulary.* 321"):
        make_train_step(dataclasses.replace(CONFIG, vocab_size=321), OPTIMIZER, mesh_of(4, 1, 2))
    with pytest.raises(ValueError, match="--fsdp=2.*36"):
        make_train_step(dataclasses.replace(CONFIG, n_head=1, n_kv_head=1, n_embd=36), OPTIMIZER, mesh_of(4, 2, 1))


@pytest.mark.slow
def test_a_number_of_devices_that_divides_nothing_is_padded():
    """Three devices: neither the width (64) nor any stack divides."""
    mesh = sharding.make_mesh(jax.devices()[:3])
    state, step = setup(mesh)
    single, single_step = setup(mesh_of(1))
    rows = tuple(np.concatenate([a, a[:, :1]], axis=1) for a in batch(0))  # nine
    for _ in range(2):
        state, metrics = step(state, *rows)
        single, expected = single_step(single, *rows)
    assert abs(float(metrics["loss"]) - float(expected["loss"])) < 1e-5
    stored = strip_padding(state, abstract_state(CONFIG, OPTIMIZER, mesh, padded=False))
    moments = stored.opt_state.adam.mu["embedding"]
    np.testing.assert_allclose(moments, single.opt_state.adam.mu["embedding"], atol=1e-6)
