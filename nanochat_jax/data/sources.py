"""Where the text of a run comes from: the user's own files, the downloaded shards, or the embedded demo data."""

import hashlib
import itertools
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.data.documents import CallableDocuments, Documents, FileDocuments, ShardDocuments
from nanochat_jax.data.hub import DATASET_OF, shards_dir
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.shards import ShardList, shards_for

# Characters of demo text: about three times what the demo's training uses, so that a longer run does not repeat much.
DEMO_CHARS = {"train": 24_000_000, "val": 1_000_000}


@dataclass(frozen=True)
class TextSource:
    """Training and held-out documents, and one line for a person."""

    train: Documents
    val: Documents
    description: str


def text_source(
    data: str = "",
    demo: bool = False,
    text_column: str = "text",
    tokens: float | None = None,
    recipe: str = "v1",
) -> TextSource:
    """`data`, a file or folder; or the embedded demo data; or, with neither, the shards of the recipe's data set in the
    base directory.

    A folder with a list of shards (``shards.json``) is the full data set of that list: what is not there is downloaded
    when it is needed, ahead of need for about `tokens` training tokens. Raises DataError saying how to get text when
    there is none.
    """
    if data and demo:
        raise DataError("--data and --demo exclude each other: give one of them")
    if demo:
        return TextSource(_demo("train"), _demo("val"), "embedded demo data")
    dataset = DATASET_OF[recipe]
    root = Path(data) if data else shards_dir(dataset)
    if root.is_dir() and (listing := ShardList.load(root)) is not None:
        expected = None if tokens is None else shards_for(tokens)
        stream = ShardDocuments(root, listing, "train", text_column, expected)
        val = ShardDocuments(root, listing, "val", text_column)
        absent = f", {stream.absent()} shards to be downloaded" if stream.absent() else ""
        return TextSource(stream, val, f"text of {root} (held out: {listing.val}{absent})")
    if not data and not any(root.glob("*.parquet")):
        raise DataError(
            f"there is no text in {root}. Give your own with --data=PATH, download shards with "
            f"`python -m nanochat_jax.data.hub -n 8 --repo={dataset}`, or use --demo"
        )
    train, val = FileDocuments(root, "train", text_column), FileDocuments(root, "val", text_column)
    return TextSource(train, val, f"text of {root} (held out: {train.held_out()})")


def _demo(split: str) -> CallableDocuments:
    from nanochat_jax.demo_world import demo_documents

    def make(start: int) -> Iterator[str]:
        return itertools.islice(demo_documents(split, DEMO_CHARS[split]), start, None)

    # The generator's code and the prose of the installed Python decide the text: name the stream by what it yields.
    digest = hashlib.sha256("\0".join(itertools.islice(make(0), 200)).encode()).hexdigest()[:12]
    return CallableDocuments(f"demo-{split}-{DEMO_CHARS[split]}-python{platform.python_version()}-{digest}", make)
