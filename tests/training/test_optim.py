"""Groups, AdamW and clipping against the reference's numbers; the combined optimizer's state and sharding."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalSubscript=false, reportOperatorIssue=false
# (optax types every tree as a union of arrays and containers)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.model.gpt import GPTConfig, abstract
from nanochat_jax.training import optim, schedules
from nanochat_jax.training.muon import muon
from tests.golden_models import below, golden_arrays
from tests.toy_params import toy_params

CONFIG = GPTConfig(sequence_len=8, vocab_size=20, n_layer=12, n_head=4, n_kv_head=2, n_embd=16)
DATA = golden_arrays("optim_v1")
SMALL = dataclasses.replace(CONFIG, n_layer=2)
NAMES = {"embedding": "transformer.wte.weight", "unembedding": "lm_head.weight"}


def constant(step):
    return 1.0


@pytest.fixture(scope="module")
def params():
    """Every entry different, so that any mix-up shows."""
    shapes = abstract(CONFIG)
    start, out = 0, []
    for leaf in jax.tree.leaves(shapes):
        size = int(np.prod(leaf.shape))
        out.append(jnp.arange(start, start + size, dtype=jnp.float32).reshape(leaf.shape))
        start += size
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


# ---------------------------------------------------------------------------------------------------------------------
# groups


def test_group_order_is_by_number_of_layer_then_by_name(params):
    """Twelve layers: as strings "10" would come before "2"."""
    groups = optim.group(CONFIG, params)
    assert set(groups) == {"embedding", "unembedding", "matrices"}
    assert {k: v.shape for k, v in groups["matrices"].items()} == {
        "16x16": (24, 16, 16),
        "16x8": (24, 16, 8),
        "16x64": (12, 16, 64),
        "64x16": (12, 64, 16),
    }
    for layer in range(12):
        block = params["h"][str(layer)]
        stacks = groups["matrices"]
        np.testing.assert_array_equal(stacks["16x16"][2 * layer], block["attn"]["c_q"]["kernel"])
        np.testing.assert_array_equal(stacks["16x16"][2 * layer + 1], block["attn"]["c_proj"]["kernel"])
        np.testing.assert_array_equal(stacks["16x8"][2 * layer], block["attn"]["c_k"]["kernel"])
        np.testing.assert_array_equal(stacks["16x8"][2 * layer + 1], block["attn"]["c_v"]["kernel"])
        np.testing.assert_array_equal(stacks["16x64"][layer], block["mlp"]["c_fc"]["kernel"])
        np.testing.assert_array_equal(stacks["64x16"][layer], block["mlp"]["c_proj"]["kernel"])


@pytest.mark.parametrize("multiple", [1, 5, 8])
def test_ungroup_is_the_inverse_with_and_without_padding(params, multiple):
    groups = optim.group(CONFIG, params)
    padded = optim.pad_stacks(groups, multiple)
    for name, stack in padded["matrices"].items():
        size = groups["matrices"][name].shape[0]
        assert stack.shape[0] % multiple == 0 and stack.shape[0] - size < multiple and not np.any(stack[size:])
    for restored in (optim.ungroup(CONFIG, groups), optim.ungroup(CONFIG, padded)):
        jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_grouping_works_on_shapes_alone():
    shapes = jax.eval_shape(lambda p: optim.pad_stacks(optim.group(CONFIG, p), 8), abstract(CONFIG))
    assert shapes["matrices"]["16x64"].shape == (16, 16, 64)
    back = jax.eval_shape(lambda g: optim.ungroup(CONFIG, g), shapes)
    assert jax.tree.map(lambda x: x.shape, back) == jax.tree.map(lambda x: x.shape, abstract(CONFIG))


def test_unknown_matrix_is_an_error(params):
    attn = {**params["h"]["0"]["attn"], "gate": {"kernel": jnp.zeros((1, 1))}}
    extra = {**params, "h": {**params["h"], "0": {"attn": attn, "mlp": params["h"]["0"]["mlp"]}}}
    with pytest.raises(ValueError, match="h/0/attn/gate/kernel"):
        optim.group(CONFIG, extra)
    with pytest.raises(ValueError, match="device count"):
        optim.pad_stacks(optim.group(CONFIG, params), 0)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


def slow_adamw(params, grads, lr, weight_decay, b1=0.8, b2=0.95, eps=1e-10):
    p, m, v = (np.array(x, np.float64) for x in (params, 0 * params, 0 * params))
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        p *= 1 - lr * weight_decay
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p -= lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def grouped(prefix):
    wte, head = (jnp.asarray(DATA[f"{prefix}/{NAMES[k]}"]) for k in ("embedding", "unembedding"))
    return {"embedding": wte, "unembedding": head.T, "matrices": {}}


ADAMW_RUNS = sorted({name.split("/")[0] for name in below(DATA, "adamw_dist/")})


@pytest.mark.parametrize("run", ADAMW_RUNS)
def test_adamw_runs(run):
    """Through the combined optimizer, learning rates derived from the width; rows without gradients stay put."""
    recorded = below(DATA, f"adamw/{run}/")
    hyper = optim.OptimHyper(weight_decay=float(recorded["group0/weight_decay"]))
    width = DATA[f"adamw/init/{NAMES['embedding']}"].shape[1]
    rates = optim.initial_learning_rates(hyper, n_embd=width)
    np.testing.assert_allclose(rates["unembedding"], recorded["group0/lr"], rtol=1e-6)
    np.testing.assert_allclose(rates["embedding"], recorded["group1/lr"], rtol=1e-6)
    transform = optim.make_optimizer(hyper, constant, n_embd=width)
    groups = grouped("adamw/init")
    state, update = transform.init(groups), jax.jit(transform.update)
    tiny = {name: np.zeros(len(DATA[f"adamw/init/{reference}"]), bool) for name, reference in NAMES.items()}
    for t in range(sum(name.startswith("param_step") for name in recorded) // len(NAMES)):
        grads = grouped(f"adamw/grad_step{t}")
        updates, state = update(grads, state, groups)
        groups = optax.apply_updates(groups, updates)
        for name, reference in NAMES.items():
            for kind, tree in (("param", groups), ("exp_avg", state.adam.mu), ("exp_avg_sq", state.adam.nu)):
                value = tree[name] if name == "embedding" else tree[name].T
                rtol, atol = {"param": (0, 2e-5), "exp_avg": (1e-5, 1e-8), "exp_avg_sq": (1e-5, 0)}[kind]
                expected = recorded[f"{kind}_step{t}/{reference}"]
                np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol, err_msg=f"{kind} {name} step {t}")
            # the distributed class puts its epsilon elsewhere, which only rows of tiny gradients can show
            size = np.abs(DATA[f"adamw/grad_step{t}/{reference}"]).max(axis=1)
            tiny[name] |= (size > 0) & (size < 1e-6)
            value = groups[name] if name == "embedding" else groups[name].T
            expected = DATA[f"adamw_dist/{run}/param_step{t}/{reference}"]
            np.testing.assert_allclose(value[~tiny[name]], expected[~tiny[name]], rtol=0, atol=2e-5)


def test_adamw_against_float64():
    rng = np.random.default_rng(11)
    wte, head = rng.normal(size=(9, 32)), rng.normal(size=(32, 9))
    grads = rng.normal(size=(6, 9, 32)) * 10.0 ** rng.integers(-6, 1, size=(6, 9, 32))
    hyper = optim.OptimHyper(embedding_lr=0.03, unembedding_lr=0.01, weight_decay=0.2, init_lr_frac=0.5)
    transform = optim.make_optimizer(hyper, constant, n_embd=32)
    groups = {"embedding": jnp.asarray(wte), "unembedding": jnp.asarray(head), "matrices": {}}
    groups = jax.tree.map(lambda x: x.astype(jnp.float32), groups)
    state, update = transform.init(groups), jax.jit(transform.update)
    for g in grads.astype(np.float32):
        updates, state = update({"embedding": g, "unembedding": g.T, "matrices": {}}, state, groups)
        groups = optax.apply_updates(groups, updates)
    scale = 0.5 * (32 / 768) ** -0.5
    np.testing.assert_allclose(groups["embedding"], slow_adamw(wte, grads, 0.03 * scale, 0.2), atol=2e-5)
    np.testing.assert_allclose(
        groups["unembedding"], slow_adamw(head, grads.transpose(0, 2, 1), 0.01 * scale, 0.2), atol=2e-5
    )


# The groups of optim_modern.npz by our names; the learning rates recorded there are those at width 768.
MODERN_GROUPS = ("unembedding", "embedding", "resid_lambdas", "x0_lambdas", "smear_gate")


def test_adamw_runs_of_july_2026():
    """Every group of that recipe with its own betas and decay; the schedule is a factor on all of them."""
    data = golden_arrays("optim_modern")
    recorded = {name: {k: data[f"adamw{i}/{k}"] for k in ("lr", "betas", "eps", "weight_decay")}
                for i, name in enumerate(MODERN_GROUPS)}  # fmt: skip
    hyper = optim.OptimHyper.of("modern", unembedding_lr=0.01, embedding_lr=0.2, scalar_lr=0.5, weight_decay=0.3)
    rates, rows = optim.initial_learning_rates(hyper, 768), optim.adamw_settings(hyper)
    for name, group in recorded.items():
        row = rows[name]
        np.testing.assert_allclose(
            [rates[name], row.b1, row.b2, row.eps, row.weight_decay],
            [group["lr"], *group["betas"], group["eps"], group["weight_decay"]],
            rtol=1e-6,
        )

    def grouped(prefix):
        return {name: jnp.asarray(data[f"{prefix}/adamw{i}"]) for i, name in enumerate(MODERN_GROUPS)} | {
            "matrices": {}
        }

    multiplier = jnp.asarray(data["schedule/lr_multiplier"])
    transform = optim.make_optimizer(hyper, lambda t: multiplier[t], 768, len(multiplier))
    groups = grouped("init")
    state, update = transform.init(groups), jax.jit(transform.update)
    for t in range(len(multiplier)):
        updates, state = update(grouped(f"grad_step{t}"), state, groups)
        groups = optax.apply_updates(groups, updates)
        for i, name in enumerate(MODERN_GROUPS):
            where = f"{name} step {t}"
            np.testing.assert_allclose(
                groups[name], data[f"fp32/param_step{t}/adamw{i}"], rtol=0, atol=2e-5, err_msg=where
            )
            for kind, tree in (("exp_avg", state.adam.mu), ("exp_avg_sq", state.adam.nu)):
                expected = data[f"fp32/{kind}_step{t}/adamw{i}"]
                np.testing.assert_allclose(tree[name], expected, rtol=1e-5, atol=1e-8, err_msg=where)


def test_matrices_decay_after_the_update():
    """As `muon` itself does it, along the cosine, with the aspect factor, and only where the update shrinks."""
    hyper = optim.OptimHyper.of("modern", ns_dtype="float32", warmup_steps=2, momentum_warmup=3)
    transform = optim.make_optimizer(hyper, 5, SMALL.n_embd)
    params = toy_params(SMALL)
    groups = optim.group(SMALL, params)
    plain = muon(
        lambda t: 0.02 * optim.lr_schedule(hyper, 5)(t),
        optim.momentum_schedule(hyper, 5),
        ns_dtype="float32",
        weight_decay=optim.matrix_decay_schedule(hyper, 5),
        **dict.fromkeys(optim.MUON_PARTS, True),
    )
    state, plain_state = transform.init(groups), plain.init(groups["matrices"])

    @jax.jit
    def both(state, plain_state, factor):
        grads = jax.tree.map(jnp.sin, groups)
        updates, new = transform.update(grads, state, groups)
        decayed = transform.decay_matrices(SMALL, optim.ungroup(SMALL, updates), params, state.muon.count, factor)
        expected, plain_new = plain.update(grads["matrices"], plain_state, groups["matrices"])
        undecayed = optim.ungroup(SMALL, updates)
        return decayed, undecayed, optim.ungroup(SMALL, {**updates, "matrices": expected}), new, plain_new

    for _ in range(3):
        decayed, undecayed, expected, state, plain_state = both(state, plain_state, 1.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), decayed, expected)
        assert np.any(decayed["h"]["0"]["mlp"]["c_fc"]["kernel"] != undecayed["h"]["0"]["mlp"]["c_fc"]["kernel"])
        np.testing.assert_array_equal(decayed["wte"]["embedding"], undecayed["wte"]["embedding"])
    rejected, undecayed, *_ = both(state, plain_state, 0.0)  # a step that is not accepted
    jax.tree.map(np.testing.assert_array_equal, rejected, undecayed)


def test_v1_has_no_part_of_the_modern_recipe():
    hyper = optim.OptimHyper.of("v1")
    assert hyper == optim.OptimHyper() and not any(getattr(hyper, part) for part in optim.MUON_PARTS)
    transform = optim.make_optimizer(hyper, 10, SMALL.n_embd)
    assert optim.matrix_decay_schedule(dataclasses.replace(hyper, weight_decay=0.1)) is None
    updates = toy_params(SMALL)
    assert transform.decay_matrices(SMALL, updates, updates, 0, 1.0) is updates
    with pytest.raises(ValueError, match="number of iterations"):
        optim.make_optimizer(optim.OptimHyper.of("modern"), constant, SMALL.n_embd)


# ---------------------------------------------------------------------------------------------------------------------
# the whole


def test_schedule_is_a_length_or_a_function():
    hyper = optim.OptimHyper(warmup_ratio=0.25, warmdown_ratio=0.5, final_lr_frac=0.1)
    expected = schedules.warmup_warmdown(8, 0.25, 0.5, 0.1)
    assert [optim.lr_schedule(hyper, 8)(t) for t in range(9)] == [expected(t) for t in range(9)]
    assert optim.lr_schedule(hyper, constant) is constant


def test_state_is_plain_arrays_and_resumes_exactly():
    groups = optim.pad_stacks(optim.group(SMALL, toy_params(SMALL)), 8)
    transform = optim.make_optimizer(optim.OptimHyper(momentum_warmup=3, warmdown_ratio=0.5), 6, CONFIG.n_embd)
    update = jax.jit(transform.update)
    state = transform.init(groups)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert {"adam/count", "adam/mu/embedding", "adam/nu/unembedding", "muon/momentum/16x64", "muon/count"} <= paths

    def run(groups, state, steps):
        for t in steps:
            grads = jax.tree.map(lambda p, t=t: jnp.sin(p + t), groups)
            updates, state = update(grads, state, groups)
            groups = optax.apply_updates(groups, updates)
        return groups, state

    uninterrupted = run(groups, state, range(6))
    half = run(groups, state, range(3))
    on_disk = [np.asarray(leaf) for leaf in jax.tree.leaves(half)]
    resumed = jax.tree.unflatten(jax.tree.structure(half), [jnp.asarray(leaf) for leaf in on_disk])
    jax.tree.map(np.testing.assert_array_equal, run(*resumed, range(3, 6)), uninterrupted)


def test_update_needs_parameters():
    groups = optim.group(SMALL, toy_params(SMALL))
    transform = optim.make_optimizer(optim.OptimHyper(), 10, CONFIG.n_embd)
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update(groups, transform.init(groups))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"ns_dtype": "fp8"}, "ns_dtype"),
        ({"matrix_lr": -1.0}, "matrix_lr"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum_final": 1.0}, "momentum_final"),
        ({"recipe": "v2"}, "recipe"),
    ],
)
def test_bad_hyperparameters(kwargs, words):
    with pytest.raises(ValueError, match=words):
        optim.OptimHyper(**kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# clipping


def test_clip_scales_to_the_norm():
    grads = {"a": jnp.full((3, 4), 2.0), "b": {"c": jnp.full((4,), -1.0)}}
    norm = np.sqrt(12 * 4 + 4)
    clipped, measured = optim.clip_by_global_norm(grads, 1.0)
    assert float(measured) == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(clipped["a"], 2.0 / (norm + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(optim.global_norm(clipped), 1.0, rtol=1e-5)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, 100.0])
def test_clip_leaves_small_gradients_alone_and_can_be_off(max_norm):
    grads = {"a": jnp.array([3.0, 4.0])}
    clipped, norm = optim.clip_by_global_norm(grads, max_norm)
    np.testing.assert_array_equal(clipped["a"], grads["a"])
    assert float(norm) == 5.0


def test_norm_of_many_numbers_is_accurate():
    """Sixteen million entries summed in float32."""
    x = jnp.full((1 << 14, 1 << 10), 1e-3)
    assert float(jax.jit(optim.global_norm)({"x": x})) == pytest.approx(1e-3 * 2**12, rel=1e-5)
