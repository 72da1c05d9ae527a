"""The choice of device never falls back to the CPU in silence."""

import os
import types

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.hardware import devices


def test_gpu_that_jax_cannot_use_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: ["NVIDIA H100 80GB HBM3"])
    with pytest.raises(devices.DeviceError, match=r"H100.*\[cuda12\].*--device=cpu"):
        devices.check("auto")
    assert "cpu" in devices.check("cpu")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/cuda-11/lib64")  # libraries that clash with JAX's own
    with pytest.raises(devices.DeviceError, match="/opt/cuda-11/lib64"):
        devices.check("auto")
    with pytest.raises(devices.DeviceError, match="auto, cpu or gpu"):
        devices.prepare("tpu9")
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: [])
    assert "cpu" in devices.check("auto")


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
    ],
)
def test_known_gpus_use_their_data_sheet(monkeypatch, kind, flops):
    monkeypatch.setattr(jax, "devices", lambda *a: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.peak_flops()[0] == flops


def test_unknown_device_is_measured_and_labelled():
    flops, source = devices.peak_flops()
    assert 1e9 < flops < 1e14
    assert source.startswith("measured")


@pytest.mark.parametrize(("visible", "count"), [(None, 4), ("", 0), ("0", 1), ("2,3", 2)])
def test_visible_gpus(monkeypatch, visible, count):
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: ["NVIDIA L40S"] * 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(devices.visible_gpus()) == count


@pytest.mark.parametrize(
    ("said", "share"), [("80000, 100000\n50000, 100000\n", 0.5), ("", 1.0), ("[N/A], [N/A]\n", 1.0), ("no\n", 1.0)]
)
def test_the_free_share_is_that_of_the_fullest_gpu(monkeypatch, said, share):
    monkeypatch.setattr(devices.subprocess, "run", lambda *a, **k: types.SimpleNamespace(stdout=said, returncode=0))
    assert devices.free_share() == share


@pytest.mark.parametrize(
    "capability,dtype",
    [("7.5", "float32"), ("8.0", "bfloat16"), ("12.0", "bfloat16"), ("gfx942", "bfloat16"), (None, "bfloat16")],
)
def test_cards_without_bfloat16_units_compute_in_float32(monkeypatch, capability, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert jnp.dtype(devices.activation_dtype()) == dtype
    monkeypatch.undo()
    assert jnp.dtype(devices.activation_dtype()) == "float32"  # on a CPU


def test_the_compile_cache_loses_what_was_not_used_for_longest(tmp_path):
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))
    (tmp_path / "plan.json").write_bytes(bytes(1000))
    devices._trim_cache(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 4
    devices._trim_cache(tmp_path, 299)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["middle-cache", "newest-cache", "plan.json"]
    devices._trim_cache(tmp_path / "missing", 0)


def test_a_peak_that_is_exceeded_is_measured_again_and_no_share_is_above_one(monkeypatch):
    measured = []
    monkeypatch.setattr(devices, "peak_flops", lambda: (measured.append(1) or 100.0, "measured"))
    peak = devices.Peak(50.0 * jax.device_count())
    assert peak.share(25.0 * jax.device_count()) == 0.5 and not measured
    assert peak.share(80.0 * jax.device_count()) == pytest.approx(0.8) and len(measured) == 1
    assert [peak.share(120.0 * jax.device_count()) for _ in range(9)] == [1.0] * 9 and len(measured) == 3
