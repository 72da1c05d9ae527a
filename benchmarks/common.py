"""What several benchmarks need: weights of ordinary size, and text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat_jax.model.gpt import GPTConfig


def random_params(config: "GPTConfig") -> Any:
    """Weights of ordinary size for every parameter of `config`, float32, always the same.

    A fresh model's zero projections would make the arithmetic too easy to be measured.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanochat_jax.model.gpt import abstract

    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(leaf.shape[0] ** -0.5))

    return jax.tree.map(draw, abstract(config))


def read_texts(paths: list[Path], max_chars: int) -> list[str]:
    """Documents of parquet files (column `text`) and text files (blank-line separated), up to about `max_chars`."""
    texts: list[str] = []
    chars = 0
    for path in paths:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            documents = pq.read_table(path, columns=["text"])["text"].to_pylist()
        else:
            documents = path.read_text(encoding="utf-8", errors="replace").split("\n\n")
        for document in documents:
            if chars >= max_chars:
                return texts
            texts.append(document)
            chars += len(document)
    return texts
