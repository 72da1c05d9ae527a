"""What is set for a node of GPUs, that jaxlib takes it, and that what the user set wins."""

import os
import sys

import pytest

from nanochat_jax.hardware.xla_flags import MEMORY_FRACTION, apply
from tests import children

H100 = "NVIDIA H100 80GB HBM3"
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"
EIGHT = {
    "XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION),
    "XLA_FLAGS": SCHEDULER,
    "NCCL_DEBUG": "WARN",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def changes(kind: str, gpus: int, alone: bool = True, **own: str) -> dict[str, str]:
    environ = dict(own)
    apply(kind, gpus, alone=alone, environ=environ)
    return {name: value for name, value in environ.items() if own.get(name) != value}


def test_settings_depend_on_the_node():
    assert changes("", 0) == {} == changes("", 0, XLA_FLAGS="--xla_gone=1")
    assert changes(H100, 1) == {"XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION)}
    assert changes(H100, 1, alone=False) == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, "leaves room for others"
    assert changes(H100, 8) == EIGHT


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
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=d"
    assert changes(H100, 8, XLA_FLAGS=own, NCCL_DEBUG="INFO", CUDA_DEVICE_MAX_CONNECTIONS="8") == {
        "XLA_CLIENT_MEM_FRACTION": str(MEMORY_FRACTION)
    }
    for variable in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        assert not any("MEM_FRACTION" in name for name in changes(H100, 8, **{variable: "0.5"}))
    assert "XLA_FLAGS" not in changes(H100, 8, XLA_FLAGS="/etc/xla.flags")  # a file: theirs alone
    # the last of two equal flags counts
    assert changes(H100, 8, XLA_FLAGS="--xla_dump_to=d")["XLA_FLAGS"] == f"{SCHEDULER} --xla_dump_to=d"


def test_what_was_set_is_returned():
    assert sorted(apply(H100, 8, environ={"HOME": "/"})) == sorted(f"{k}={v}" for k, v in EIGHT.items())
    assert apply(H100, 8, environ=dict(EIGHT)) == []


def test_a_process_starts_with_the_applied_flags(tmp_path):
    """A release of jaxlib that drops a flag fails here and not on the paid node: there the process would end in C++."""
    code = (
        "from nanochat_jax.hardware import devices\n"
        f"devices.nvidia_gpus = lambda: [{H100!r}] * 8\n"
        "devices.prepare('auto')\n"
        "import jax, os\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "print(float(jax.numpy.ones(3).sum()), os.environ['XLA_FLAGS'])"
    )
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    done = children.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"3.0 {SCHEDULER}", done.stderr
