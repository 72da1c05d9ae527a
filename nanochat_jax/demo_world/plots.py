"""The plots of stories and fables, from plots.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanochat_jax.demo_world.tables import read_table
from nanochat_jax.demo_world.template import Template

_TABLE = read_table("plots")
POOLS: Mapping[str, tuple[str, ...]] = _TABLE["slots"]
BESIDE: Mapping[str, tuple[str, ...]] = _TABLE["beside"]


@dataclass(frozen=True)
class Plot:
    """A story line: its name, the slots that are filled by chance (see `stories.py`), and its text.

    (plot, hero, slots) is the combination that belongs to one split.
    """

    name: str
    slots: tuple[str, ...]
    text: str

    @cached_property
    def template(self) -> Template:
        text = self.text
        for mark, shared in _TABLE["shared"].items():
            text = text.replace(f"%{mark}%", shared)
        return Template(text)


def _plots(rows: tuple[Mapping[str, Any], ...]) -> tuple[Plot, ...]:
    return tuple(Plot(**row) for row in rows)


STORIES: tuple[Plot, ...] = _plots(_TABLE["story"])
FABLES: tuple[Plot, ...] = _plots(_TABLE["fable"])
