"""What several benchmarks need: weights of ordinary size, text, and the flags that name it."""

import argparse
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


def text_parser(description: str | None, repeats: int, competitors: str) -> argparse.ArgumentParser:
    """The flags of a benchmark on text: --data, --max-chars, --vocab-size, --repeats, and --competitors, a folder with
    the packages named in `competitors`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=_file, required=True, help="parquet or text files")
    parser.add_argument("--max-chars", type=int, default=100_000_000)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--competitors", type=Path, help=f"folder that {competitors} installed into (pip --target)")
    return parser


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return Path(text)
