"""A card that is not there, as a compile target: XLA needs its limits only, not the card."""

import importlib.metadata
import os
import re

from nanochat_jax.hardware.gpus import Card
from nanochat_jax.utils.errors import UserError


class NoPlugin(UserError, RuntimeError):
    """The CUDA plugin of JAX is not installed, so nothing can be compiled for a GPU."""


def text_proto(card: Card) -> str:
    """XLA's `GpuTargetConfigProto` of a card, as text."""
    major, minor = card.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": card.shared_per_core,
        "shared_memory_per_block_optin": card.shared_optin,
        "threads_per_core_limit": card.threads_per_core,
        "core_count": card.cores,
        "fpus_per_core": card.fpus_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": int(card.memory_bandwidth),
        "l2_cache_size": card.l2_bytes,
        "clock_rate_ghz": card.clock_ghz,
        "device_memory_size": card.memory_bytes,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}")
    if card.links:
        lines.append(f"  device_interconnect_info {{ active_links: {card.links} }}")
    dnn = "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*_cudnn_version())
    info = "\n".join(lines)
    return f'gpu_device_info {{\n{info}\n}}\nplatform_name: "CUDA"\n{dnn}\ndevice_description_str: "{card.name}"\n'


def _cudnn_version() -> tuple[int, int, int]:
    """Of the cuDNN that the plugin brings: the one the real run uses."""
    for package in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        try:
            found = re.match(r"(\d+)\.(\d+)\.(\d+)", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
        if found:
            return int(found[1]), int(found[2]), int(found[3])
    return 9, 10, 0


def plugin_version() -> str | None:
    """The version of the installed CUDA plugin; None if there is none."""
    for package in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def environment(card: Card, gpus: int) -> dict[str, str]:
    """The environment of a process that compiles for the card: the flags of a real run, but no GPU is touched."""
    from nanochat_jax.hardware import xla_flags

    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    env.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # our own cache holds the few numbers that matter
    xla_flags.apply(card.name, gpus, environ=env)
    return env


def devices(card: Card, gpus: int) -> list:
    """Devices to build a mesh of. Raises NoPlugin without the CUDA plugin. Call in a process of `environment`."""
    from jax.experimental import topologies

    if plugin_version() is None:
        raise NoPlugin("compiling for a GPU needs the CUDA plugin (no GPU): pip install '.[cuda12]'")
    described = topologies.get_topology_desc(
        card.name, platform="cuda", target_config=text_proto(card), topology=f"1x1x{gpus}"
    )
    return list(described.devices)
