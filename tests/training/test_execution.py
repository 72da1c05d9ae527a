"""How a step is executed is said at the start; on a GPU the slow way is said, or refused."""

import types

import jax
import pytest

from nanochat_jax.hardware import xla_flags
from nanochat_jax.hardware.devices import DeviceError
from nanochat_jax.model import attention
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.parallel import sharding
from nanochat_jax.training import execution
from nanochat_jax.training.execution import announce, missing_flags

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there are GPUs; returns a mesh of so many, of that kind and capability."""
    attention.choose_implementation.cache_clear()

    def pretend(kind=H100, capability="9.0", number=8, flags=True):
        client = types.SimpleNamespace(platform_version="cuda 12090")
        device = types.SimpleNamespace(client=client, compute_capability=capability, platform="gpu", device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        environ = {}
        xla_flags.apply(kind, number if flags else 0, environ=environ)
        monkeypatch.setenv("XLA_FLAGS", environ.get("XLA_FLAGS", ""))
        return types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device]), size=number)

    yield pretend
    attention.choose_implementation.cache_clear()


def config(**overrides):
    shape = dict(sequence_len=64, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=64)
    return GPTConfig(**{**shape, **overrides})


def test_on_a_cpu_nothing_is_slow(capsys):
    announce(config(), sharding.make_mesh(jax.devices()), require_fast=True)
    [line] = capsys.readouterr().out.splitlines()
    assert all(words in line for words in ("blocked attention", "float32", "8 devices"))


def test_the_fast_way_is_one_line(gpu, capsys):
    announce(config(), gpu(), require_fast=True)
    [line] = capsys.readouterr().out.splitlines()
    assert all(words in line for words in ("cuDNN", "fused norms", "bfloat16", "8 devices"))


@pytest.mark.parametrize(
    ("device", "overrides", "words"),
    [
        ({}, dict(attention="xla"), "requested"),
        ({}, dict(compute_dtype="float32"), "float32"),
        ({}, dict(n_embd=48), "half a head, 24"),
        (dict(capability="7.5", kind="Tesla T4"), {}, "8.0"),
        (dict(flags=False), {}, "latency_hiding_scheduler"),
        (dict(flags=False, number=1, kind="NVIDIA A100-SXM4-80GB"), {}, "triton_gemm"),
    ],
)
def test_the_slow_way_is_said_and_refused_if_asked(gpu, capsys, device, overrides, words):
    mesh = gpu(**device)
    announce(config(**overrides), mesh, require_fast=False)
    first, *slow = capsys.readouterr().out.splitlines()
    assert any(line.startswith("slow: ") and words in line for line in slow)
    with pytest.raises(DeviceError, match="--require_fast"):
        announce(config(**overrides), mesh, require_fast=True)


def test_a_flag_that_the_user_gave_another_value_is_not_lacking(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert missing_flags(H100, 1) == []
    monkeypatch.setenv("XLA_FLAGS", "/etc/xla.flags")
    assert len(missing_flags(H100, 1)) == 1 and execution.missing_flags(H100, 8)


@pytest.mark.parametrize(("capability", "works"), [("8.0", False), ("8.6", False), ("8.9", True), ("9.0", True)])
def test_float8_is_refused_where_there_is_none(gpu, capsys, capability, works):
    mesh = gpu(capability=capability)
    if works:
        announce(config(), mesh, require_fast=True, fp8=True)
        assert "float8" in capsys.readouterr().out
    else:
        with pytest.raises(DeviceError, match=f"--fp8.*8.9.*{capability}"):
            announce(config(), mesh, require_fast=False, fp8=True)


def test_float8_that_would_silently_be_bfloat16_is_slow(gpu, monkeypatch):
    mesh = gpu()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_gpu_enable_latency_hiding_scheduler=true")
    announce(config(), mesh, require_fast=True)
    with pytest.raises(DeviceError, match="triton_gemm"):
        announce(config(), mesh, require_fast=True, fp8=True)


def test_fused_norms_are_for_nvidia_gpus_and_can_be_switched_off(gpu, capsys):
    mesh = gpu()
    [device] = mesh.devices.flat
    assert execution.norms_refused(config(), device, wanted=True) == ""
    announce(config(), mesh, require_fast=False, fused_norms=False)
    first, slow = capsys.readouterr().out.splitlines()
    assert "XLA's norms" in first and "(requested)" in slow
    device.client.platform_version = "rocm 60300"
    assert "NVIDIA" in execution.norms_refused(config(), device, wanted=True)
    device.platform = "cpu"
    assert "NVIDIA" in execution.norms_refused(config(), device, wanted=True)
