"""Makes shuffled pretraining shards of any text: python -m dev.repackage_data --data=PATH --out=FOLDER; see --help."""

import sys
from dataclasses import dataclass

from dev.repackage import SHARD_CHARS, repackage
from nanochat_jax.utils import errors
from nanochat_jax.utils.flags import flag, parse
from nanochat_jax.utils.progress import ShareProgress


@dataclass(frozen=True)
class RepackageSettings:
    """Flags."""

    data: str = flag("", "file or folder of text (parquet, jsonl, txt, md)", path=True)
    out: str = flag("", "folder for the shards; train on them with --data=FOLDER", path=True)
    text_column: str = flag("text", "name of the text column or key in parquet and jsonl files")
    seed: int = flag(42, "decides the order of the documents, together with the input alone")
    shard_chars: int = flag(SHARD_CHARS, "characters of a shard, about")
    max_memory: int = flag(2048, "MiB that the whole process may take")


def main() -> int:
    s = parse(RepackageSettings, sys.argv[1:], "Makes shuffled pretraining shards of any text.")
    if not s.data or not s.out:
        print("error: give --data=PATH and --out=FOLDER", file=sys.stderr)
        return 2
    return errors.exit_status(lambda: _run(s))


def _run(s: RepackageSettings) -> None:
    with ShareProgress("repackaging") as progress:
        made = repackage(
            s.data,
            s.out,
            text_column=s.text_column,
            seed=s.seed,
            shard_chars=s.shard_chars,
            max_memory=s.max_memory * 2**20,
            progress=progress,
        )
    print(
        f"{made.documents:,} documents, {made.characters:,} characters in {len(made.listing.shards)} shards in "
        f"{s.out}; {made.listing.val} is held out; {made.stats.invalid_utf8} invalid UTF-8 sequences replaced, "
        f"{made.stats.bad_lines} lines left out"
    )


if __name__ == "__main__":
    sys.exit(main())
