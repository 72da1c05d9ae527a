"""Schedules against the reference's numbers, as Python floats and inside jit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.training import schedules


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "lr_v1.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def modern(golden):
    return json.loads((golden / "schedules_modern.json").read_text(encoding="utf-8"))


def check(schedule, steps, expected):
    """The Python value to float64 precision and the traced value to float32 precision."""
    values = [schedule(step) for step in steps]
    assert all(type(value) is float for value in values)
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=0)
    traced = jax.jit(jax.vmap(schedule))(jnp.asarray(steps))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, expected, rtol=1e-6, atol=1e-7)


def test_pretraining_multiplier(recorded):
    for case in recorded["base_lr"]:
        schedule = schedules.warmup_warmdown(
            case["num_iterations"], case["warmup_ratio"], case["warmdown_ratio"], case["final_lr_frac"]
        )
        check(schedule, case["steps"], case["lr_multiplier"])


@pytest.mark.parametrize("name", ["base_muon_momentum", "mid_muon_momentum"])
def test_muon_momentum(recorded, name):
    check(schedules.momentum_warmup(), recorded[name]["steps"], recorded[name]["momentum"])


@pytest.mark.parametrize("name, length", [("sft_lr", "num_iterations"), ("rl_lr", "num_steps")])
def test_linear_stages(recorded, name, length):
    for case in recorded[name]:
        check(schedules.linear_to_zero(case[length]), case["steps"], case["lr_multiplier"])


def test_midtraining_multiplier(recorded):
    case = recorded["mid_lr"]
    steps = [round(progress * 10**7) for progress in case["progress"]]  # whole ones
    # its line ends at 2e-16 instead of 0; and ours does not go on into the negative where progress overshoots
    check(schedules.late_decay(10**7), steps, np.maximum(np.round(case["lr_multiplier"], 12), 0))


def test_midtraining_by_step():
    check(schedules.late_decay(50), range(53), [min(1.0, max(0.0, (50 - t) / 10)) for t in range(53)])


def test_pretraining_of_july_2026(modern):
    """Multiplier, momentum and weight decay; two of the runs are so short that the momentum's two lines overlap."""
    for case in modern["base"]:
        n, steps, down = case["num_iterations"], case["steps"], case["warmdown_ratio"]
        rate = schedules.warmup_warmdown(n, 0.0, down, case["final_lr_frac"], case["warmup_steps"])
        check(rate, steps, case["lr_multiplier"])
        check(schedules.momentum_warmup_warmdown(n, down), steps, case["muon_momentum"])
        scale, multiplier = case["weight_decay_scaled"], schedules.cosine_to_zero(n)
        check(lambda t, scale=scale, multiplier=multiplier: scale * multiplier(t), steps, case["weight_decay"])


def test_finetuning_momentum_of_july_2026(modern):
    case = modern["sft"]
    for one in case if isinstance(case, list) else [case]:
        check(schedules.momentum_warmup(), one["muon_momentum_steps"], one["muon_momentum"])


@given(
    n=st.integers(1, 5000),
    warmup=st.floats(0, 0.5),
    warmdown=st.floats(0, 0.5),
    frac=st.floats(0, 1),
    position=st.floats(0, 1),
)
def test_pretraining_multiplier_against_branches(n, warmup, warmdown, frac, position):
    step = int(position * n)
    warm, down = round(warmup * n), round(warmdown * n)
    if step < warm:
        expected = (step + 1) / warm
    elif step <= n - down:
        expected = 1.0
    else:
        progress = (n - step) / down
        expected = progress * 1.0 + (1 - progress) * frac
    assert schedules.warmup_warmdown(n, warmup, warmdown, frac)(step) == pytest.approx(expected, rel=1e-12)


def test_no_warmup_of_the_momentum():
    check(schedules.momentum_warmup(0), [0, 1, 100], [0.95, 0.95, 0.95])


def test_halves_round_to_even():
    """round(0.5) is 0 and round(2.5) is 2: as long as the reference's warm-down, not one step longer."""
    assert schedules.warmup_warmdown(25, warmdown_ratio=0.1)(23) == 1.0
    assert schedules.warmup_warmdown(25, warmdown_ratio=0.1)(24) == 0.5


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: schedules.warmup_warmdown(0), "num_iterations"),
        (lambda: schedules.warmup_warmdown(10, warmup_ratio=1.5), "warmup_ratio"),
        (lambda: schedules.warmup_warmdown(10, warmdown_ratio=-0.1), "warmdown_ratio"),
        (lambda: schedules.linear_to_zero(0), "num_iterations"),
        (lambda: schedules.late_decay(0), "num_iterations"),
        (lambda: schedules.momentum_warmup(-1), "warm-up"),
        (lambda: schedules.warmup_warmdown(10, warmup_steps=-1), "warmup_steps"),
        (lambda: schedules.momentum_warmup_warmdown(10, 1.5), "warmdown_ratio"),
        (lambda: schedules.momentum_warmup_warmdown(0), "num_iterations"),
        (lambda: schedules.cosine_to_zero(0), "num_iterations"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
