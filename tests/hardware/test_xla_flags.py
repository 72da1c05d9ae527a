"""What is set for a node of GPUs, that jaxlib takes it, and that what the user set wins."""

import os
import sys

import pytest

from nanochat_jax.hardware.xla_flags import MEMORY_FRACTION, apply
from tests import children

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE"
ATOMICS = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"
MEMORY = {"XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION)}
ONE = MEMORY | {"XLA_FLAGS": NO_TRITON}
EIGHT = {
    **MEMORY,
    "XLA_FLAGS": f"{SCHEDULER} {NO_TRITON}",
    "NCCL_DEBUG": "WARN",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def changes(kind: str, gpus: int, alone: bool = True, settings=None, **own: str) -> dict[str, str]:
    environ = dict(own)
    apply(kind, gpus, alone=alone, environ=environ, **(settings or {}))
    return {name: value for name, value in environ.items() if own.get(name) != value}


def test_settings_depend_on_the_node():
    assert changes("", 0) == {} == changes("", 0, XLA_FLAGS="--xla_gone=1")
    assert changes(H100, 1) == ONE
    decoding = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": GRAPHS}
    assert changes(H100, 1, alone=False) == decoding, "leaves room for others"
    assert changes(H100, 8) == EIGHT


@pytest.mark.parametrize(("free", "pool"), [(1.0, 0.92), (0.98, 0.92), (0.95, 0.9), (0.8, 0.75), (0.2, 0.92)])
def test_a_desktop_keeps_its_memory_and_another_run_is_waited_for(free, pool):
    settings = changes("NVIDIA GeForce RTX 4090", 1, settings=dict(free=free))
    assert float(settings["XLA_CLIENT_MEM_FRACTION"]) == pytest.approx(pool)


def test_rl_trains_and_decodes():
    assert changes(H100, 1, settings=dict(decodes=True))["XLA_FLAGS"] == f"{GRAPHS} {NO_TRITON}"


def test_a_process_for_each_gpu_is_a_node_of_many():
    assert changes(H100, 1, settings=dict(processes=8)) == EIGHT
    assert changes("", 0, settings=dict(processes=8)) == {}


@pytest.mark.parametrize(
    ("kind", "jaxlib", "needed"),
    [
        (A100, "0.10.2", True),
        (A100, "0.11.0", True),
        (A100, "0.11.1", False),
        (A100, "0.12.0.1", False),
        ("NVIDIA GeForce RTX 4090", "0.10.2", True),
        ("NVIDIA RTX 6000 Ada Generation", "0.10.2", True),
        ("NVIDIA L40S", "0.10.2", True),
        (H100, "0.10.2", False),
        ("NVIDIA GeForce RTX 5090", "0.10.2", False),
        ("Tesla T4", "0.10.2", False),
    ],
)
def test_additions_to_memory_are_native(kind, jaxlib, needed):
    assert (ATOMICS in changes(kind, 1, settings=dict(jaxlib=jaxlib))["XLA_FLAGS"]) == needed


@pytest.mark.parametrize(
    ("kind", "one_queue"),
    [
        ("NVIDIA H100 PCIe", True),
        ("NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA GeForce RTX 3090", True),
        ("NVIDIA B200", False),
        ("NVIDIA RTX 6000 Ada Generation", False),
        ("Tesla T4", False),
    ],
)
def test_one_queue_before_blackwell(kind, one_queue):
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in changes(kind, 8)) == one_queue


def test_what_the_user_set_wins():
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_gpu_enable_triton_gemm=true"
    assert changes(H100, 8, XLA_FLAGS=own, NCCL_DEBUG="INFO", CUDA_DEVICE_MAX_CONNECTIONS="8") == MEMORY
    for variable in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        assert not any("MEM_FRACTION" in name for name in changes(H100, 8, **{variable: "0.5"}))
    assert "XLA_FLAGS" not in changes(H100, 8, XLA_FLAGS="/etc/xla.flags")  # a file: theirs alone
    # the last of two equal flags counts
    assert changes(H100, 8, XLA_FLAGS="--xla_dump_to=d")["XLA_FLAGS"] == f"{SCHEDULER} {NO_TRITON} --xla_dump_to=d"


def test_what_was_set_is_returned():
    assert sorted(apply(H100, 8, environ={"HOME": "/"})) == sorted(f"{k}={v}" for k, v in EIGHT.items())
    assert apply(H100, 8, environ=dict(EIGHT)) == []


@pytest.mark.parametrize(("kind", "alone"), [(H100, True), (A100, True), (A100, False)])
def test_a_process_starts_with_the_applied_flags(tmp_path, kind, alone):
    """A release of jaxlib that drops a flag fails here and not on the paid node: there the process would end in C++."""
    code = (
        "from nanochat_jax.hardware import devices\n"
        f"devices.nvidia_gpus = lambda: [{kind!r}] * 8\n"
        f"devices.prepare('auto', alone={alone}, decodes=True)\n"
        "import jax, os\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "print(float(jax.numpy.ones(3).sum()), os.environ['XLA_FLAGS'])"
    )
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    done = children.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    expected = changes(kind, 8, alone, dict(decodes=True))["XLA_FLAGS"]
    assert done.stdout.strip() == f"3.0 {expected}", done.stderr
