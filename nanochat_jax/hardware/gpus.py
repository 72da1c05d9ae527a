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
_PCIE_5: dict[str, Any] = dict(link="PCIe 5.0 x16", link_bandwidth=64e9)
_PCIE_X8: dict[str, Any] = dict(link="PCIe 4.0 x8", link_bandwidth=16e9)

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
    "gh200": Card(
        "NVIDIA GH200 480GB", 101_800_000_000, 4.0e12, 989e12, "NVLink 4", 450e9, 1.5,
        cores=132, clock_ghz=1.98, links=18, **_HOPPER,
    ),
    "rtxpro6000": Card(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 101_900_000_000, 1.792e12, 503.8e12, price=1.8,
        capability=(12, 0), cores=188, l2_bytes=134_217_728, clock_ghz=2.617, **(_SMALL | _PCIE_5),
    ),
    "rtx6000ada": Card(
        "NVIDIA RTX 6000 Ada Generation", 50_900_000_000, 0.96e12, 364.2e12, price=0.77,
        capability=(8, 9), cores=142, l2_bytes=100_663_296, clock_ghz=2.505, **_SMALL,
    ),
    "a6000": Card(
        "NVIDIA RTX A6000", 50_900_000_000, 0.768e12, 154.8e12, price=0.49,
        capability=(8, 6), cores=84, l2_bytes=6_291_456, clock_ghz=1.8, **_SMALL,
    ),
    "gb10": Card(  # its memory is the system's
        "NVIDIA GB10", 128_000_000_000, 0.273e12, 125e12, "ConnectX-7", 25e9, 0.2, capability=(12, 1), cores=48,
        fpus_per_core=128, l2_bytes=25_165_824, clock_ghz=2.418, shared_per_core=102_400, threads_per_core=1536,
    ),
    "l40s": Card(
        "NVIDIA L40S", 47_800_000_000, 0.864e12, 362e12, price=0.9,
        capability=(8, 9), cores=142, l2_bytes=100_663_296, clock_ghz=2.52, **_SMALL,
    ),
    "l40": Card(
        "NVIDIA L40", 47_800_000_000, 0.864e12, 181e12, price=0.8,
        capability=(8, 9), cores=142, l2_bytes=100_663_296, clock_ghz=2.49, **_SMALL,
    ),
    "a10g": Card(
        "NVIDIA A10G", 23_600_000_000, 0.6e12, 70e12, price=1.0,
        capability=(8, 6), cores=80, l2_bytes=6_291_456, clock_ghz=1.71, **_SMALL,
    ),
    "a10": Card(
        "NVIDIA A10", 23_600_000_000, 0.6e12, 125e12, price=0.6,
        capability=(8, 6), cores=72, l2_bytes=6_291_456, clock_ghz=1.695, **_SMALL,
    ),
    "l4": Card(
        "NVIDIA L4", 23_600_000_000, 0.3e12, 121e12, price=0.6,
        capability=(8, 9), cores=58, l2_bytes=50_331_648, clock_ghz=2.04, **_SMALL,
    ),
    "rtx5090": Card(
        "NVIDIA GeForce RTX 5090", 33_700_000_000, 1.792e12, 209.5e12, price=0.7,
        capability=(12, 0), cores=170, l2_bytes=100_663_296, clock_ghz=2.407, **(_SMALL | _PCIE_5),
    ),
    "rtx5080": Card(
        "NVIDIA GeForce RTX 5080", 16_900_000_000, 0.96e12, 112.6e12, price=0.35,
        capability=(12, 0), cores=84, l2_bytes=67_108_864, clock_ghz=2.617, **(_SMALL | _PCIE_5),
    ),
    "rtx5070": Card(
        "NVIDIA GeForce RTX 5070", 12_500_000_000, 0.672e12, 61.7e12, price=0.2,
        capability=(12, 0), cores=48, l2_bytes=50_331_648, clock_ghz=2.512, **(_SMALL | _PCIE_5),
    ),
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090", 25_390_000_000, 1.008e12, 165e12, price=0.4,
        capability=(8, 9), cores=128, l2_bytes=75_497_472, clock_ghz=2.52, **_SMALL,
    ),
    "rtx4080": Card(
        "NVIDIA GeForce RTX 4080", 17_000_000_000, 0.717e12, 97.5e12, price=0.25,
        capability=(8, 9), cores=76, l2_bytes=67_108_864, clock_ghz=2.505, **_SMALL,
    ),
    "rtx4070": Card(
        "NVIDIA GeForce RTX 4070", 12_500_000_000, 0.504e12, 58.3e12, price=0.15,
        capability=(8, 9), cores=46, l2_bytes=37_748_736, clock_ghz=2.475, **_SMALL,
    ),
    "rtx4060": Card(
        "NVIDIA GeForce RTX 4060", 8_300_000_000, 0.272e12, 30.2e12, price=0.1,
        capability=(8, 9), cores=24, l2_bytes=25_165_824, clock_ghz=2.46, **(_SMALL | _PCIE_X8),
    ),
    "rtx3090": Card(
        "NVIDIA GeForce RTX 3090", 25_430_000_000, 0.936e12, 71e12, price=0.22,
        capability=(8, 6), cores=82, l2_bytes=6_291_456, clock_ghz=1.695, **_SMALL,
    ),
    "rtx3080": Card(
        "NVIDIA GeForce RTX 3080", 10_500_000_000, 0.76e12, 59.5e12, price=0.15,
        capability=(8, 6), cores=68, l2_bytes=5_242_880, clock_ghz=1.71, **_SMALL,
    ),
    "rtx3070": Card(
        "NVIDIA GeForce RTX 3070", 8_300_000_000, 0.448e12, 40.6e12, price=0.1,
        capability=(8, 6), cores=46, l2_bytes=4_194_304, clock_ghz=1.725, **_SMALL,
    ),
    "rtx3060": Card(
        "NVIDIA GeForce RTX 3060", 12_600_000_000, 0.36e12, 25.5e12, price=0.1,
        capability=(8, 6), cores=28, l2_bytes=3_145_728, clock_ghz=1.777, **_SMALL,
    ),
}  # fmt: skip

_ALIASES = {
    "a100": "a100-80", "a100-pcie-40gb": "a100-40", "h100-sxm": "h100", "gb200": "b200",
    "rtx-a6000": "a6000", "rtx-pro-6000": "rtxpro6000",
    **{name.removeprefix("rtx"): name for name in CARDS if re.fullmatch(r"rtx\d{4}", name)},
}  # fmt: skip
# Cards that share a name and little else: chips of notebooks, slices of a card.
_OTHER_CARDS = re.compile(r"\b(laptop|mobile|max-q|mig|d)\b", re.I)


def find(name: str) -> Card:
    """The card of that name, in any spelling of its key ("H100", "rtx-4090") or as its driver has it. ValueError lists
    those there are."""
    key = _SPELLINGS.get(_squeezed(name))
    card = CARDS[key] if key else of_device(name)
    if card is None:
        raise InputError(f"--gpu={name} is not known; give one of: {', '.join(CARDS)}")
    return card


def of_device(kind: str) -> Card | None:
    """The card that a driver calls so ("NVIDIA H100 80GB HBM3"), or its nearest relative here ("NVIDIA H100 NVL": the
    same); None for any other device."""
    for card in CARDS.values():
        if card.name == kind:
            return card
    if _OTHER_CARDS.search(kind):
        return None
    found = [spelling for spelling, pattern in _PATTERNS.items() if pattern.search(kind)]
    return CARDS[_SPELLINGS[max(found, key=len)]] if found else None  # the longest: "H100 PCIe" is no "H100"


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _pattern(name: str) -> re.Pattern[str]:
    """Matches the name as a word of its own: an "L40" is no "L4", an "RTX A1000" no "A100"."""
    spelled = r"[\s_-]*".join(re.findall(r"[a-z]+|\d+", name))
    return re.compile(rf"(?<![a-z0-9]){spelled}(?![a-z0-9])", re.I)


_SPELLINGS = {_squeezed(key): key for key in CARDS} | {_squeezed(k): v for k, v in _ALIASES.items()}
_PATTERNS = {_squeezed(name): _pattern(name) for name in (*CARDS, *_ALIASES)}
