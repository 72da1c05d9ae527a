"""GPUs by their makers' data sheets.

Rates are dense bfloat16 with float32 sums (not the doubled figures for sparse matrices); bandwidths are peak figures of
the sheets. `memory_bytes` is what CUDA offers a process on such a card, somewhat less than the number on its box. The
price is a typical one of a rented card in US dollars an hour, as of 2026: the plan's --price and the report's
--price_per_hour override it.
"""

import re
from dataclasses import dataclass
from typing import Any

from nanochat_jax.utils.errors import InputError


@dataclass(frozen=True)
class Card:
    """One GPU. Units: bytes, bytes per second, FLOP/s, GHz; `link_bandwidth` is to its peers, in one direction."""

    name: str  # as the driver reports it
    memory_bytes: int
    memory_bandwidth: float
    bf16_flops: float
    link: str
    link_bandwidth: float
    price: float  # US dollars an hour
    # limits the compiler needs to know
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    l2_bytes: int
    clock_ghz: float
    shared_per_core: int
    threads_per_core: int
    links: int = 0  # NVLink connections

    @property
    def shared_optin(self) -> int:
        """Shared memory that one block can ask for: all of a core's but the kilobyte the driver keeps."""
        return self.shared_per_core - 1024


_HOPPER: dict[str, Any] = dict(
    capability=(9, 0), fpus_per_core=128, l2_bytes=52_428_800, shared_per_core=233_472, threads_per_core=2048
)
_A100: dict[str, Any] = dict(
    capability=(8, 0), cores=108, fpus_per_core=64, l2_bytes=41_943_040, clock_ghz=1.41, shared_per_core=167_936,
    threads_per_core=2048, link="NVLink 3", link_bandwidth=300e9, links=12, bf16_flops=312e12,
)  # fmt: skip
_SMALL: dict[str, Any] = dict(
    fpus_per_core=128, shared_per_core=102_400, threads_per_core=1536, link="PCIe 4.0 x16", link_bandwidth=32e9
)

CARDS: dict[str, Card] = {
    "h100": Card(
        "NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35e12, 989e12, "NVLink 4", 450e9, 3.0,
        cores=132, clock_ghz=1.98, links=18, **_HOPPER,
    ),
    "h100-pcie": Card(
        "NVIDIA H100 PCIe", 84_942_979_072, 2.0e12, 756e12, "PCIe 5.0 x16", 64e9, 2.4,
        cores=114, clock_ghz=1.755, **_HOPPER,
    ),
    "h200": Card(
        "NVIDIA H200", 151_397_597_184, 4.8e12, 989e12, "NVLink 4", 450e9, 3.8,
        cores=132, clock_ghz=1.98, links=18, **_HOPPER,
    ),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", 42_331_013_120, 1.555e12, price=1.3, **_A100),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.039e12, price=1.79, **_A100),
    "b200": Card(
        "NVIDIA B200", 191_514_411_008, 7.7e12, 2250e12, "NVLink 5", 900e9, 5.5, capability=(10, 0), cores=148,
        fpus_per_core=128, l2_bytes=132_644_864, clock_ghz=1.965, shared_per_core=233_472, threads_per_core=2048,
        links=18,
    ),
    "l40s": Card(
        "NVIDIA L40S", 47_800_000_000, 0.864e12, 362e12, price=0.9,
        capability=(8, 9), cores=142, l2_bytes=100_663_296, clock_ghz=2.52, **_SMALL,
    ),
    "l4": Card(
        "NVIDIA L4", 23_600_000_000, 0.3e12, 121e12, price=0.6,
        capability=(8, 9), cores=58, l2_bytes=50_331_648, clock_ghz=2.04, **_SMALL,
    ),
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090", 25_390_000_000, 1.008e12, 165e12, price=0.4,
        capability=(8, 9), cores=128, l2_bytes=75_497_472, clock_ghz=2.52, **_SMALL,
    ),
    "rtx3090": Card(
        "NVIDIA GeForce RTX 3090", 25_430_000_000, 0.936e12, 71e12, price=0.22,
        capability=(8, 6), cores=82, l2_bytes=6_291_456, clock_ghz=1.695, **_SMALL,
    ),
}  # fmt: skip

_ALIASES = {"a100": "a100-80", "h100-sxm": "h100", "4090": "rtx4090", "3090": "rtx3090"}


def find(name: str) -> Card:
    """The card of that name, in any spelling of its key ("H100", "rtx-4090"). ValueError lists those there are."""
    key = _SPELLINGS.get(_squeezed(name))
    if key is None:
        raise InputError(f"--gpu={name} is not known; give one of: {', '.join(CARDS)}")
    return CARDS[key]


def of_device(kind: str) -> Card | None:
    """The card that a driver calls so ("NVIDIA H100 80GB HBM3"), or its nearest relative here ("NVIDIA H100 NVL": the
    same); None for any other device."""
    for card in CARDS.values():
        if card.name == kind:
            return card
    found = [spelling for spelling in _SPELLINGS if spelling in _squeezed(kind)]
    return CARDS[_SPELLINGS[max(found, key=len)]] if found else None  # the longest: an "L40S" is no "L4"


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


_SPELLINGS = {_squeezed(key): key for key in CARDS} | {_squeezed(k): v for k, v in _ALIASES.items()}
