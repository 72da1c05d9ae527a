"""Compression of the tokenizer, against stock encodings on texts of several kinds."""

import json
import logging
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanochat_jax.data.documents import text_iterator
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.sources import text_source
from nanochat_jax.text.tokenizer import Tokenizer, TokenizerError
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.flags import flag
from nanochat_jax.utils.paths import tokenizer_dir, write_atomic

REPORT_NAME = "evaluation.json"
DATA_CHARS = 1_000_000

TEXTS: dict[str, str] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class TokEvalSettings:
    """Flags of scripts.tok_eval."""

    data: str = flag(
        "", "also measure on this file or folder of text; default: the downloaded shards if there are any", path=True
    )
    text_column: str = flag("text", "name of the text column or key in parquet and jsonl files")
    demo: bool = flag(False, "also measure on the embedded demo data")
    encodings: str = flag("gpt2,cl100k_base", "tiktoken encodings to compare with, comma-separated")


@dataclass(frozen=True)
class Measure:
    """Bytes and tokens of one text under one encoding."""

    bytes: int
    tokens: int

    @property
    def ratio(self) -> float:
        """Bytes per token: higher is better."""
        return self.bytes / self.tokens


def measure(tokenizer: Tokenizer, texts: dict[str, str]) -> dict[str, Measure]:
    """Bytes and tokens of every text. Raises TokenizerError if one does not come back exactly."""
    found = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise TokenizerError(
                f"the text {name!r} does not come back exactly; the tokenizer is damaged, train it anew"
            )
        found[name] = Measure(len(text.encode()), len(ids))
    return found


def relative_saving(ours: Measure, theirs: Measure) -> float:
    """How many fewer tokens we need, in per cent of theirs (negative: more)."""
    return 100 * (theirs.tokens - ours.tokens) / theirs.tokens


def collect_texts(settings: TokEvalSettings, recipe: str = "v1") -> dict[str, str]:
    """The project's own texts, and the first part of the training and held-out text where there is any."""
    texts = dict(TEXTS)
    try:
        source = text_source(settings.data, settings.demo, settings.text_column, recipe=recipe)
    except DataError as error:
        if settings.data or settings.demo:
            raise
        print(f"no text of your own is measured: {error}")
        return texts
    for name, documents in (("train", source.train), ("val", source.val)):
        texts[name] = "\n".join(text_iterator(documents.iterate(), DATA_CHARS, DATA_CHARS))
    return texts


def stock_tokenizers(names: Iterable[str]) -> dict[str, Tokenizer]:
    """The stock encodings that can be loaded; for any other, a line that says why not."""
    found = {}
    for name in names:
        try:
            found[name] = Tokenizer.from_tiktoken(name)
        except ConnectionError as error:
            print(f"not compared with {name}: {error}")
    return found


def evaluate(settings: TokEvalSettings) -> dict[str, dict[str, Measure]]:
    """Measures, prints tables and saves the numbers beside the tokenizer; returns {encoding: {text: measure}}."""
    tokenizer = Tokenizer.load()
    texts = collect_texts(settings, tokenizer.training.get("recipe", "v1"))
    results = {"ours": measure(tokenizer, texts)}
    others = stock_tokenizers(name.strip() for name in settings.encodings.split(",") if name.strip())
    sizes = {"ours": tokenizer.vocab_size, **{name: other.vocab_size for name, other in others.items()}}
    for name, other in others.items():
        results[name] = measure(other, texts)
    console = Console()
    print("vocabulary: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    if not others:
        console.print(_own_table(results["ours"]))
    for name in others:
        console.print(_comparison(name, results[name], results["ours"]))
    numbers = {
        encoding: {text: {"bytes": m.bytes, "tokens": m.tokens} for text, m in measures.items()}
        for encoding, measures in results.items()
    }
    content = {"tokenizer_hash": tokenizer.hash, "vocab_sizes": sizes, "measures": numbers}
    write_atomic(tokenizer_dir() / REPORT_NAME, json.dumps(content, indent=1) + "\n")
    return results


def main(argv: Sequence[str]) -> int:
    """The command line. Exit status: 0 measured, 1 error, 2 bad flags, 130 stopped by Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = flags.parse(TokEvalSettings, argv, f"python -m scripts.tok_eval: {__doc__}")

    def action() -> None:
        evaluate(settings)

    return errors.exit_status(action)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column("text")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _own_table(ours: dict[str, Measure]) -> Table:
    table = _table("compression", "bytes", "tokens", "bytes/token")
    for name, m in ours.items():
        table.add_row(name, f"{m.bytes:,}", f"{m.tokens:,}", f"{m.ratio:.2f}")
    return table


def _comparison(name: str, theirs: dict[str, Measure], ours: dict[str, Measure]) -> Table:
    columns = "bytes", f"{name} tokens", "bytes/token", "our tokens", "bytes/token", "tokens saved", "better"
    table = _table(f"compression against {name}", *columns)
    for text, t in theirs.items():
        o = ours[text]
        better = "tie" if o.tokens == t.tokens else "ours" if o.tokens < t.tokens else name
        saved = f"{relative_saving(o, t):+.1f}%"
        table.add_row(
            text, f"{t.bytes:,}", f"{t.tokens:,}", f"{t.ratio:.2f}", f"{o.tokens:,}", f"{o.ratio:.2f}", saved, better
        )
    return table
