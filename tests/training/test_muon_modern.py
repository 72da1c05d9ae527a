"""The parts of Muon in the recipe of July 2026, against the reference's numbers and a slow float64 version."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalSubscript=false, reportOperatorIssue=false
# (optax types every tree as a union of arrays and containers)

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.training.muon import POLAR_EXPRESS_COEFFICIENTS, MuonState, muon, orthogonalize

PARTS = ("muon_eq", "polar_express", "muon_plus", "normuon", "cautious")
ALL = dict.fromkeys(PARTS, True)


@pytest.fixture(scope="module")
def data(golden):
    with np.load(golden / "optim_modern.npz") as arrays:
        return dict(arrays)


polar = jax.jit(functools.partial(orthogonalize, polar_express=True), static_argnums=(1, 2))


def slow_polar(x, express=True):
    x = x / (1.01 * np.linalg.norm(x) + 1e-6 if express else np.linalg.norm(x) + 1e-7)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS if express else [(3.4445, -4.7750, 2.0315)] * 5:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class SlowMuon:
    """One (out, in) matrix in float64, as the specification has it."""

    def __init__(self, param, **parts):
        self.p = np.asarray(param, np.float64)
        self.m, self.parts = np.zeros_like(self.p), parts
        rows, cols = self.p.shape
        self.axis = 1 if rows >= cols else 0  # averaged over by NorMuon
        self.v = np.zeros((rows, 1) if rows >= cols else (1, cols))

    def step(self, grad, lr, mu, wd):
        rows, cols = self.p.shape
        self.m = mu * self.m + (1 - mu) * grad
        x = (1 - mu) * grad + mu * self.m
        if "muon_eq" in self.parts:
            norms = np.linalg.norm(x, axis=1, keepdims=True)
            x = x * (np.linalg.norm(x) / np.sqrt(rows)) / np.maximum(norms, 1e-6)
        x = slow_polar(x, "polar_express" in self.parts)
        if "muon_plus" in self.parts:
            x = x * np.sqrt(min(rows, cols)) / max(np.linalg.norm(x), 1e-6)
        if "normuon" in self.parts:
            square = (x * x).mean(self.axis, keepdims=True)
            self.v = 0.9 * self.v + 0.1 * square
            y = x / np.sqrt(np.maximum(self.v, 1e-10))
            x = y * np.linalg.norm(x) / max(np.linalg.norm(y), 1e-10)
        rate = lr * max(1, rows / cols) ** 0.5
        if "cautious" in self.parts:
            self.p = self.p - rate * x - rate * wd * self.p * (x * self.p >= 0)
        else:
            self.p = self.p - rate * x - lr * wd * self.p
        return self.p


def run(transform, params, grads):
    """Parameters and state after every update."""
    state, update, out = transform.init(params), jax.jit(transform.update), []
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, state))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# the reference's numbers


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("mode, dtype", [("fp32", "float32"), ("bf16_muon", "bfloat16")])
def test_runs_of_the_reference(data, layout, mode, dtype):
    """Both layouts: what is a row there is a column of our kernels."""
    names = sorted({key.split("/")[1].split("_")[0] for key in data if key.startswith("init/muon")})

    def stacks(prefix):
        found = {name: [k for k in data if k.startswith(f"{prefix}/{name}_p")] for name in names}
        return {name: flip(np.stack([data[k] for k in keys])) for name, keys in found.items()}

    def flip(x):
        return jnp.asarray(x if layout == "out_in" else x.swapaxes(-1, -2))

    rates, momenta, decays = (
        jnp.asarray(data[f"schedule/{k}"]) for k in ("lr_multiplier", "muon_momentum", "muon_weight_decay")
    )
    base = float(data["muon0/lr"])
    transform = muon(
        lambda t: base * rates[t],
        lambda t: momenta[t],
        ns_dtype=dtype,
        kernel_layout=layout,
        weight_decay=lambda t: decays[t],
        beta2=float(data["muon0/beta2"]),
        **ALL,
    )
    start = stacks("init")
    history = run(transform, start, [stacks(f"grad_step{t}") for t in range(len(rates))])
    for t, (params, state) in enumerate(history):
        for name, expected in stacks(f"{mode}/param_step{t}").items():
            momentum = flip(data[f"{mode}/momentum_buffer_step{t}/{name}"])
            np.testing.assert_allclose(state.momentum[name], momentum, rtol=1e-6, atol=1e-6)
            if mode == "bf16_muon" and layout == "in_out":  # products of square kernels are taken from the other side
                moved = np.linalg.norm(expected - start[name])
                assert np.linalg.norm(params[name] - expected) <= 0.1 * moved, f"{name} step {t}"
                continue
            # otherwise in bf16 too: rounded where the reference rounds
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=1e-5, err_msg=f"{name} step {t}")
            second = flip(data[f"{mode}/second_momentum_buffer_step{t}/{name}"])
            np.testing.assert_allclose(state.second_moment[name], second, rtol=1e-4)


def test_coefficients_are_the_recorded_ones(golden):
    recorded = json.loads((golden / "schedules_modern.json").read_text(encoding="utf-8"))["polar_express_coeffs"]
    assert [list(abc) for abc in POLAR_EXPRESS_COEFFICIENTS] == recorded


# ---------------------------------------------------------------------------------------------------------------------
# Polar Express


def test_scalar_map_of_the_specification():
    expected = {0.001: 0.85887, 0.01: 1.02711, 0.05: 0.90856, 0.1: 1.05916, 0.3: 0.98314, 0.5: 0.91061, 0.9: 0.87492}
    for s, value in expected.items():
        # before the iteration x is divided by 1.01 times its norm and 1e-6
        small = s * (1.01 + 1e-6)
        rest = np.sqrt(1 - small * small)
        result = polar(jnp.diag(jnp.array([small, rest], jnp.float32)), 5, "float32")
        assert float(result[0, 0]) == pytest.approx(value, abs=2e-4), s


@pytest.mark.parametrize("shape", [(16, 64), (96, 24), (40, 48), pytest.param((64, 128), marks=pytest.mark.slow)])
def test_any_condition_number(shape):
    """Singular values over 0 to 8 decades, plain and Gram form, against float64."""
    rng, small = np.random.default_rng(3), min(shape)
    for decades in (0, 1, 2, 3, 5, 8):
        u, _ = np.linalg.qr(rng.normal(size=(shape[0], small)))
        v, _ = np.linalg.qr(rng.normal(size=(shape[1], small)))
        x = ((u * 10 ** np.linspace(0, -decades, small)) @ v.T).astype(np.float32)
        result = polar(x, 5, "float32")
        np.testing.assert_allclose(result, slow_polar(x.astype(np.float64)), rtol=0, atol=2e-5)


def test_zero_stays_zero_and_step_counts():
    stack = np.zeros((3, 8, 4), np.float32)
    stack[1] = np.random.default_rng(0).normal(size=(8, 4))
    for dtype in ("float32", "bfloat16"):
        result = np.asarray(polar(stack, 5, dtype), np.float32)
        assert not result[0].any() and not result[2].any() and result[1].any() and np.isfinite(result).all()
    with pytest.raises(ValueError, match="<= 5"):
        polar(stack, 6, "float32")


# ---------------------------------------------------------------------------------------------------------------------
# each part


SHAPES = [(48, 12), (10, 30), (16, 16)]  # (out, in)


@pytest.mark.parametrize("parts", [(), *((p,) for p in PARTS), PARTS], ids=lambda parts: "+".join(parts) or "none")
def test_parts_against_float64(parts):
    """Other shapes, seeds and schedules than the recorded run: each part alone, and all of them."""
    rng = np.random.default_rng(7)
    params = [rng.normal(size=s).astype(np.float32) for s in SHAPES]
    grads = [[rng.normal(size=s).astype(np.float32) * 10.0**-t for s in SHAPES] for t in range(4)]
    for step in grads:
        step[0][5] = 0  # a neuron without a gradient
        step[1] *= np.linspace(0.01, 3, 10, dtype=np.float32)[:, None]
    lr, mu, wd = [0.1, 0.05, 0.0, 0.03], [0.8, 0.9, 0.95, 0.97], [0.3, 0.2, 0.1, 0.0]
    arrays = [jnp.array(x) for x in (lr, mu, wd)]
    at = [lambda t, x=x: x[t] for x in arrays]
    transform = muon(at[0], at[1], ns_dtype="float32", weight_decay=at[2], **dict.fromkeys(parts, True))
    ours = [p.T for p in params], [[g.T for g in step] for step in grads]  # kernels (in, out)
    slow = [SlowMuon(p, **dict.fromkeys(parts, True)) for p in params]
    for t, (values, state) in enumerate(run(transform, *ours)):
        for i, one in enumerate(slow):
            want = one.step(grads[t][i], lr[t], mu[t], wd[t])
            np.testing.assert_allclose(values[i].T, want, rtol=0, atol=1e-5, err_msg=f"{SHAPES[i]} step {t}")
            if "normuon" in parts:
                np.testing.assert_allclose(state.second_moment[i].T, one.v, rtol=1e-4, atol=1e-9)
        assert (state.second_moment is None) == ("normuon" not in parts)


def test_equilibration_is_per_output_neuron():
    """A neuron whose gradient is a thousand times larger moves as far as the others; an input's is left alone."""
    grads = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(24, 8)), jnp.float32)}
    per_neuron = jnp.array([[1000.0, *[1.0] * 7]])
    transform = muon(1.0, ns_dtype="float32", muon_eq=True)

    def first(grads):
        return jax.jit(transform.update)(grads, transform.init(grads))[0]["w"]

    plain = first(grads)
    np.testing.assert_allclose(first({"w": grads["w"] * per_neuron}), plain, atol=1e-5)
    per_input = jnp.ones((24, 1)).at[3].set(1000.0)
    assert np.abs(first({"w": grads["w"] * per_input}) - plain).max() > 0.05


def test_switches_that_are_off_change_nothing():
    """Not one bit: `muon` without them is the same program as with each of them named and off."""
    grads = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(2, 12, 20)), jnp.float32)}
    off = muon(0.1, **dict.fromkeys(PARTS, False), weight_decay=0.0, ns_dtype="float32")
    plain = muon(0.1, ns_dtype="float32")
    texts = [jax.jit(t.update).lower(grads, t.init(grads)).as_text() for t in (off, plain)]
    assert texts[0] == texts[1]
    assert jax.tree.structure(plain.init(grads)) == jax.tree.structure(MuonState(0, {"w": 0}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_gradients(dtype):
    """A zero update, no NaN; parameters decay all the same, those of a stack's padding stay zero."""
    params = {"w": jnp.ones((2, 4, 6)).at[1].set(0.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for decay in (0.0, 0.5):
        transform = muon(0.1, ns_dtype=dtype, weight_decay=decay, **ALL)
        updates, state = jax.jit(transform.update)(zeros, transform.init(params), params)
        expected = -0.1 * decay * np.sqrt(1.5) * params["w"]
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
        assert not np.any(state.momentum["w"]) and not np.any(state.second_moment["w"])


def test_cautious_decay_looks_at_signs():
    """Only entries that the update does not enlarge decay; the rate carries the aspect factor."""
    rng = np.random.default_rng(3)
    params, grads = ({"w": jnp.asarray(rng.normal(size=(6, 24)), jnp.float32)} for _ in range(2))
    both = [muon(0.1, ns_dtype="float32", weight_decay=wd, cautious=True) for wd in (0.0, 0.5)]
    plain, decayed = (jax.jit(t.update)(grads, t.init(params), params)[0]["w"] for t in both)
    shrinking = np.asarray(plain * params["w"] <= 0)
    assert 0.2 < shrinking.mean() < 0.8
    np.testing.assert_allclose(decayed, plain - 0.1 * 0.5 * 2 * shrinking * params["w"], atol=1e-6)


def test_stack_equals_separate_matrices_and_padding_is_ignored():
    rng = np.random.default_rng(4)
    grads, params = (rng.normal(size=(5, 12, 20)).astype(np.float32) for _ in range(2))
    grads[4] = params[4] = 0
    transform = muon(0.1, 0.9, ns_dtype="float32", weight_decay=0.1, **ALL)

    def first(grads, params):
        return jax.jit(transform.update)(grads, transform.init(params), params)

    stacked, state = first({"w": grads}, {"w": params})
    alone, _ = first(*({str(i): x[i] for i in range(4)} for x in (grads, params)))
    for i in range(4):
        np.testing.assert_allclose(stacked["w"][i], alone[str(i)], atol=1e-6)
    assert not np.any(stacked["w"][4]) and not np.any(state.second_moment["w"][4])


def test_sharded_stack_needs_no_communication():
    """Eight devices, the stack axis sharded, the second moments with it: the same numbers, not one collective."""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    placed = jax.NamedSharding(mesh, jax.P("data"))
    rng = np.random.default_rng(6)
    grads, params = ({"w": rng.normal(size=(16, 8, 24)).astype(np.float32)} for _ in range(2))
    transform = muon(0.1, ns_dtype="float32", weight_decay=0.1, **ALL)
    update, fresh = jax.jit(transform.update), transform.init(params)
    expected, expected_state = update(grads, fresh, params)
    place = jax.tree.map(lambda x: placed if x.ndim else jax.NamedSharding(mesh, jax.P()), fresh)
    arguments = jax.device_put(grads, placed), jax.device_put(fresh, place), jax.device_put(params, placed)
    text = str(update.lower(*arguments).compile().as_text())
    assert not any(kind in text for kind in ("all-reduce", "all-gather", "all-to-all", "reduce-scatter"))
    updates, state = update(*arguments)
    np.testing.assert_allclose(updates["w"], expected["w"], atol=1e-6)
    assert state.second_moment["w"].addressable_shards[0].data.shape[0] == 2
    np.testing.assert_allclose(state.second_moment["w"], expected_state.second_moment["w"], rtol=1e-5)
