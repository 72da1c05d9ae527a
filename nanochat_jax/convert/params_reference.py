"""Parameters in and out of the reference system's names and (out, in) shapes."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from nanochat_jax.model.gpt import GPTConfig, Params, abstract


def _reference_name(path) -> str:
    """'h/0/attn/c_q/kernel' -> 'transformer.h.0.attn.c_q.weight'."""
    parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")[:-1]
    prefix = [] if parts[0] == "lm_head" else ["transformer"]
    return ".".join([*prefix, *parts, "weight"])


def params_from_reference(
    config: GPTConfig, arrays: Mapping[str, np.ndarray], rename: Callable[[str], str] = str
) -> Params:
    """The parameter tree of `config` from the reference's state dict.

    `arrays` maps names such as 'transformer.h.0.attn.c_q.weight' to arrays in (out, in) layout; values are cast to
    float32. `rename` turns such a name into the one that `arrays` has for it. Raises ValueError naming every missing,
    unexpected or wrongly shaped tensor.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract(config))
    names = [rename(_reference_name(path)) for path, _ in leaves]
    problems = [f"missing {name}" for name in names if name not in arrays]
    problems += [f"unexpected {name}" for name in arrays if name not in names]
    out = []
    for name, (path, leaf) in zip(names, leaves, strict=True):
        if name not in arrays:
            continue
        value = np.asarray(arrays[name], dtype=np.float32)
        value = value if _is_embedding(path) else value.T
        if value.shape != leaf.shape:
            problems.append(f"{name} has shape {arrays[name].shape}, the config needs {_stored(path, leaf)} (out, in)")
        out.append(np.ascontiguousarray(value))
    if problems:
        raise ValueError("the tensors do not fit the config: " + "; ".join(problems))
    return jax.tree.map(jax.numpy.asarray, jax.tree_util.tree_unflatten(treedef, out))


def params_to_reference(config: GPTConfig, params: Params) -> dict[str, np.ndarray]:
    """The reference's state dict (float32 numpy arrays, (out, in) layout) of a parameter tree."""
    jax.tree.map(lambda a, p: None, abstract(config), params)  # raises on a tree of another structure
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        _reference_name(path): np.array(leaf if _is_embedding(path) else np.asarray(leaf).T, dtype=np.float32)
        for path, leaf in leaves
    }


def _is_embedding(path) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator="/").startswith("wte")


def _stored(path, leaf) -> tuple[int, ...]:
    return leaf.shape if _is_embedding(path) else leaf.shape[::-1]
