"""Bits per byte against the reference's numbers, and its independence of batch size and device count."""

import math

import jax
import numpy as np
import pytest

from nanochat_jax.evals.bpb import held_out_loss
from nanochat_jax.parallel import sharding
from tests.golden_models import golden_arrays, golden_model
from tests.tokenizer_fixtures import golden

MODEL, DATA = golden_model("model_v1", "A/"), golden_arrays("bpb_v1")
CASES = {name: case for name, case in golden("bpb_v1")["results"].items() if "bpb" in case}


def bits_per_byte(config, params, batches, token_bytes, mesh=None):
    weighted = ((x, y, np.ones(np.shape(y), np.float32)) for x, y in batches)
    return held_out_loss(config, params, weighted, token_bytes, mesh)["val_bpb"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_golden(case):
    n = case["steps"]
    batches = list(zip(DATA["x"][:n], DATA[case["y"]][:n], strict=True))
    assert bits_per_byte(*MODEL, batches, DATA["token_bytes"]) == pytest.approx(case["bpb"], rel=1e-5)


def test_does_not_depend_on_batch_size_or_devices():
    x, y = (DATA[k].reshape(-1, DATA["x"].shape[-1]) for k in ("x", "y/mixed"))
    n = len(x) - len(x) % 2
    at_once, mesh = [(x[:n], y[:n])], sharding.make_mesh(jax.devices()[:2])
    expected = pytest.approx(bits_per_byte(*MODEL, at_once, DATA["token_bytes"]), rel=1e-6)
    assert bits_per_byte(*MODEL, [(x[i : i + 1], y[i : i + 1]) for i in range(n)], DATA["token_bytes"]) == expected
    assert bits_per_byte(*MODEL, at_once, DATA["token_bytes"], mesh) == expected


def test_nothing_to_count_is_infinite_not_an_error():
    y = np.full_like(DATA["y/plain"][0], -1)
    assert bits_per_byte(*MODEL, [(DATA["x"][0], y)], DATA["token_bytes"]) == math.inf
