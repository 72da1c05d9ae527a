"""Parameters in and out of the names and (out, in) kernels of other systems: the reference's, or Hugging Face's."""

from collections.abc import Mapping

import jax
import numpy as np

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.parameters import Naming, Params, flat, leaves, nested


def params_from_reference(config: GPTConfig, arrays: Mapping[str, np.ndarray], naming: Naming = "reference") -> Params:
    """The parameter tree of `config` from the reference's state dict.

    `arrays` maps names such as 'transformer.h.0.attn.c_q.weight' (or those of another `naming`) to arrays in (out, in)
    layout; values are cast to float32. Raises ValueError naming every missing, unexpected or wrongly shaped tensor.
    """
    known = {leaf.name(naming): leaf for leaf in leaves(config)}
    problems = [f"missing {name}" for name in known if name not in arrays]
    problems += [f"unexpected {name}" for name in arrays if name not in known]
    values: list[tuple[str, np.ndarray]] = []
    for name, leaf in known.items():
        if name not in arrays:
            continue
        value = np.asarray(arrays[name], dtype=np.float32)
        shape = leaf.shape[::-1] if leaf.transposed else leaf.shape
        if value.shape != shape:
            problems.append(f"{name} has shape {value.shape}, the config needs {shape} (out, in)")
        values.append((leaf.path, np.ascontiguousarray(value.T if leaf.transposed else value)))
    if problems:
        raise ValueError("the tensors do not fit the config: " + "; ".join(problems))
    return jax.tree.map(jax.numpy.asarray, nested(values))


def params_to_reference(config: GPTConfig, params: Params, naming: Naming = "reference") -> dict[str, np.ndarray]:
    """The reference's state dict (float32 numpy arrays, (out, in) layout) of a parameter tree, or one of another
    `naming`. Raises ValueError for a tree of another structure."""
    by_path = {leaf.path: leaf for leaf in leaves(config)}
    named = {}
    for path, value in flat(config, params).items():
        leaf, array = by_path[path], np.asarray(value, dtype=np.float32)
        named[leaf.name(naming)] = np.array(array.T if leaf.transposed else array)
    return named
