"""Parameters of small models, drawn by numpy: jax.random is compiled for every shape, which takes half a second."""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.model import gpt


def toy_params(config: gpt.GPTConfig, seed: int = 0) -> gpt.Params:
    """A float32 parameter tree without zeros, as if trained: the embedding N(0, 1), kernels N(0, 1 / fan_in)."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        std = 1.0 if "wte" in jax.tree_util.keystr(path) else leaf.shape[0] ** -0.5
        return jnp.asarray(np.float32(std) * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, gpt.abstract(config))


def on_one_device(shapes):
    """A tree of shapes as what is restored to the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)
