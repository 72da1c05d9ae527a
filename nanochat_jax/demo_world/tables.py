"""Tables of words and phrases: TOML files beside the code that uses them, each read once."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

HERE = "nanochat_jax.demo_world"


@cache
def read_table(name: str, package: str = HERE) -> dict[str, Any]:
    """The contents of the file `name`.toml of `package`, its lists as tuples. Shared by all callers: not to be changed.

    Raises FileNotFoundError where there is no such file, tomllib.TOMLDecodeError where it is damaged.
    """
    return _frozen(tomllib.loads(resources.files(package).joinpath(f"{name}.toml").read_text("utf-8")))


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(v) for key, v in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
