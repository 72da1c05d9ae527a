"""Bits per byte against the reference's numbers, and its independence of batch size and device count."""

import json
import math

import jax
import numpy as np
import pytest

from nanochat_jax.convert.params_reference import params_from_reference
from nanochat_jax.evals.bpb import held_out_loss
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.parallel import sharding


@pytest.fixture(scope="module")
def model(golden):
    z = np.load(golden / "model_v1.npz")
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    config = GPTConfig(**{k: int(z[f"A/config/{k}"]) for k in names})
    prefix = "A/param/"
    return config, params_from_reference(config, {k[len(prefix) :]: z[k] for k in z.files if k.startswith(prefix)})


@pytest.fixture(scope="module")
def data(golden):
    return np.load(golden / "bpb_v1.npz")


def bits_per_byte(config, params, batches, token_bytes, mesh=None):
    weighted = ((x, y, np.ones(np.shape(y), np.float32)) for x, y in batches)
    return held_out_loss(config, params, weighted, token_bytes, mesh)["val_bpb"]


def cases():
    return ["plain", "ignored", "mixed", "many_special"]


@pytest.mark.parametrize("case", cases())
def test_golden(model, data, golden, case):
    results = json.loads((golden / "bpb_v1.json").read_text())["results"]
    found = [key for key in results if key.startswith(f"{case}/")]
    assert found
    for key in found:
        k = results[key]["steps"]
        batches = list(zip(data["x"][:k], data[f"y/{case}"][:k], strict=True))
        got = bits_per_byte(*model, batches, data["token_bytes"])
        assert got == pytest.approx(results[key]["bpb"], rel=1e-5)


def test_does_not_depend_on_batch_size_or_devices(model, data):
    x, y = (data[k].reshape(-1, data["x"].shape[-1]) for k in ("x", "y/mixed"))
    n = len(x) - len(x) % 2
    whole = bits_per_byte(*model, [(x[:n], y[:n])], data["token_bytes"])
    rows = bits_per_byte(*model, [(x[i : i + 1], y[i : i + 1]) for i in range(n)], data["token_bytes"])
    mesh = sharding.make_mesh(jax.devices()[:2])
    spread = bits_per_byte(*model, [(x[:n], y[:n])], data["token_bytes"], mesh)
    assert rows == pytest.approx(whole, rel=1e-6)
    assert spread == pytest.approx(whole, rel=1e-6)


def test_nothing_to_count_is_infinite_not_an_error(model, data):
    y = np.full_like(data["y/plain"][0], -1)
    assert bits_per_byte(*model, [(data["x"][0], y)], data["token_bytes"]) == math.inf
