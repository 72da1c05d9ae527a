"""XLA flags reach JAX only if they parse: an unknown one would end the process. What the user set wins."""

import json
import os
import re
import subprocess
import sys

import pytest

from nanochat_jax.hardware import devices, xla_flags
from nanochat_jax.hardware.xla_flags import (
    SETTINGS,
    FlagError,
    Node,
    Setting,
    apply,
    merge,
    settings_for,
    unknown_flags,
)
from tests import children

EIGHT = Node("NVIDIA H100 80GB HBM3", 8)
GONE = "--xla_gpu_enable_async_collectives=true"  # in many a list on the web; unknown to today's jaxlib


def test_every_flag_of_the_table_parses(tmp_path):
    """A release of jaxlib that drops one fails here and not on the paid node."""
    flags = [s.flag for s in SETTINGS if s.is_flag]
    assert flags and unknown_flags(flags, tmp_path / "flags.json") == []


def test_unknown_flags_are_found_and_remembered(tmp_path, monkeypatch):
    cache, good = tmp_path / "flags.json", "--xla_gpu_enable_latency_hiding_scheduler=true"
    assert unknown_flags([good, GONE], cache) == [GONE]
    [(_, answers)] = json.loads(cache.read_text()).items()
    assert answers == {good: True, GONE: False}
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
    assert unknown_flags([GONE, good], cache) == [GONE]
    monkeypatch.undo()
    cache.write_text("{")  # damaged: asked again
    assert unknown_flags([GONE], cache) == [GONE]


def test_another_jaxlib_is_asked_anew(tmp_path, monkeypatch):
    cache = tmp_path / "flags.json"
    assert unknown_flags([GONE], cache) == [GONE]
    monkeypatch.setattr(xla_flags, "_versions", lambda: "99.0")
    monkeypatch.setattr(xla_flags, "_parses", lambda flags: True)
    assert unknown_flags([GONE], cache) == []


def test_every_setting_has_a_reason_and_a_name_of_its_own():
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)
    assert all(len(s.reason) > 30 for s in SETTINGS)


@pytest.mark.parametrize(
    ("kind", "generation"),
    [
        ("NVIDIA H100 80GB HBM3", "hopper"),
        ("NVIDIA H100 PCIe", "hopper"),
        ("NVIDIA B200", "blackwell"),
        ("NVIDIA A100-SXM4-80GB", "ampere"),
        ("NVIDIA GeForce RTX 3090", "ampere"),
        ("NVIDIA GeForce RTX 4090", "ada"),
        ("NVIDIA L40S", "ada"),
        ("NVIDIA RTX 6000 Ada Generation", "ada"),
        ("NVIDIA GeForce RTX 5090", "blackwell"),
        ("Tesla T4", ""),
    ],
)
def test_generations(kind, generation):
    assert Node(kind, 1).generation == generation


def names(node):
    return {s.name for s in settings_for(node)}


def test_settings_depend_on_the_node():
    assert settings_for(Node("", 0)) == []
    assert names(Node("NVIDIA H100 PCIe", 1)) == {"XLA_CLIENT_MEM_FRACTION"}
    assert {"CUDA_DEVICE_MAX_CONNECTIONS", "xla_gpu_enable_latency_hiding_scheduler"} <= names(EIGHT)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in names(Node("NVIDIA B200", 8))
    assert names(Node("NVIDIA H100 PCIe", 1, alone=False)) == {"XLA_PYTHON_CLIENT_PREALLOCATE"}, (
        "leaves room for others"
    )


def test_what_the_user_set_wins():
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=d"
    changes, taken = merge(settings_for(EIGHT), {"XLA_FLAGS": own, "NCCL_DEBUG": "INFO"})
    assert "XLA_FLAGS" not in changes and "NCCL_DEBUG" not in changes
    assert {s.name for s in taken} == {"XLA_CLIENT_MEM_FRACTION", "CUDA_DEVICE_MAX_CONNECTIONS"}
    for variable in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        changes, _ = merge(settings_for(EIGHT), {variable: "0.5"})
        assert not any("MEM_FRACTION" in name for name in changes)
    assert "XLA_FLAGS" not in merge(settings_for(EIGHT), {"XLA_FLAGS": "/etc/xla.flags"})[0]  # a file: theirs alone


def test_own_flags_come_last_so_that_they_count():
    changes, _ = merge(settings_for(EIGHT), {"XLA_FLAGS": "--xla_dump_to=d"})
    assert changes["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true --xla_dump_to=d"


def test_apply_leaves_out_what_jaxlib_does_not_know(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    name = GONE.removeprefix("--").partition("=")[0]
    monkeypatch.setattr(xla_flags, "SETTINGS", (*SETTINGS, Setting(name, "true", "a flag that was dropped")))
    environ = {"XLA_FLAGS": "--xla_dump_to=d"}
    notes = apply(EIGHT, environ)
    assert name not in environ["XLA_FLAGS"] and environ["XLA_FLAGS"].endswith("--xla_dump_to=d")
    assert any(re.match(rf"left out, unknown to jaxlib .*: {GONE}", note) for note in notes)
    assert environ["XLA_CLIENT_MEM_FRACTION"] == str(xla_flags.MEMORY_FRACTION)
    assert any("three quarters" in note for note in notes)


def test_own_unknown_flag_is_an_error_not_an_abort(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(FlagError, match=rf"{GONE}.*Remove it"):
        apply(EIGHT, {"XLA_FLAGS": GONE})
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: ["NVIDIA H100 80GB HBM3"])
    monkeypatch.setenv("XLA_FLAGS", GONE)
    with pytest.raises(devices.DeviceError, match=GONE):
        devices.prepare("auto")


def test_nothing_is_set_without_gpus():
    environ = {"XLA_FLAGS": GONE}  # not looked at either: the CPU run is as before
    assert apply(Node("", 0), environ) == [] and environ == {"XLA_FLAGS": GONE}


def test_a_process_starts_with_the_applied_flags(tmp_path):
    """The point of it all: JAX computes, with the flags in the environment."""
    code = (
        "from nanochat_jax import devices, xla_flags\n"
        "devices.nvidia_gpus = lambda: ['NVIDIA H100 80GB HBM3'] * 8\n"
        "devices.prepare('auto')\n"
        "import jax, os\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "print(float(jax.numpy.ones(3).sum()), os.environ['XLA_FLAGS'])"
    )
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    done = children.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "3.0 --xla_gpu_enable_latency_hiding_scheduler=true", done.stderr
