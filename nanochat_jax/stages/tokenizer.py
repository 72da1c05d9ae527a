"""Training the tokenizer: its flags, the text it sees, what it reports."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.documents import text_iterator
from nanochat_jax.data.sources import text_source
from nanochat_jax.model.config import RECIPES
from nanochat_jax.text.tokenizer import FILE_NAME, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, TokenizerError
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.flags import flag
from nanochat_jax.utils.paths import check_writable, sha256_hex, tokenizer_dir, write_atomic
from nanochat_jax.utils.progress import Live

# Text the finished tokenizer must give back exactly: scripts, numbers, spaces, joined emoji, and special strings.
ROUND_TRIP = (
    "Hello world! It's 12,345.67 — don't\tworry.\r\n\n  def f(x):\n      return x**2\n"
    "Grüße, ¿qué tal? Привет! 你好，世界 こんにちは 안녕 مرحبا שלום 👩‍👩‍👧‍👦🏽 <|bos|> <|assistant_end|>\u0000\ufffd"
)


@dataclass(frozen=True)
class TokTrainSettings:
    """Flags of scripts.tok_train. Names and defaults are the reference's where it has them."""

    data: str = flag(
        "", "file or folder of your own text (parquet, txt, md, jsonl); default: the downloaded shards", path=True
    )
    text_column: str = flag("text", "name of the text column or key in parquet and jsonl files")
    recipe: str = flag(
        "v1", "the reference's of October 2025, or its modern one of July 2026 (they change with this flag)",
        choices=RECIPES,
    )  # fmt: skip
    demo: bool = flag(False, "train on the embedded demo data with small defaults (they change with this flag)")
    max_chars: int = flag(10_000_000_000, "read at most about this many characters")
    doc_cap: int = flag(10_000, "read at most this many characters of a document")
    vocab_size: int = flag(65536, "tokens, the 256 bytes and the nine special tokens included")
    force: bool = flag(False, "train even if this tokenizer has been trained before")


DEFAULTS = TokTrainSettings()
MODERN = TokTrainSettings(recipe="modern", max_chars=2_000_000_000, vocab_size=32768)
DEMO = TokTrainSettings(demo=True, max_chars=5_000_000, vocab_size=2048)


def parse_settings(argv: list[str]) -> TokTrainSettings:
    """Settings from command-line arguments; exits with status 2 on a mistake."""
    recipes = {"v1": DEFAULTS, "modern": MODERN}
    defaults = DEMO if flags.is_set("demo", argv) else recipes.get(flags.chosen("recipe", argv) or "v1", DEFAULTS)
    return flags.parse(defaults, argv, f"python -m scripts.tok_train: {__doc__}")


def train_tokenizer(settings: TokTrainSettings) -> Tokenizer:
    """Trains a tokenizer on the training text, saves it, prints a report.

    The same text and settings as before give the same tokenizer, so it is kept. Another tokenizer in its place is set
    aside, not overwritten: models trained with it need it. Raises DataError, TokenizerError.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if settings.vocab_size < smallest:
        raise TokenizerError(f"--vocab_size={settings.vocab_size} is too small; it must be {smallest} or more")
    if settings.max_chars < 1 or settings.doc_cap < 1:
        raise TokenizerError("--max_chars and --doc_cap must be 1 or more")
    source = text_source(settings.data, settings.demo, settings.text_column, recipe=settings.recipe)
    inputs = {
        "source": source.train.fingerprint(),
        "pattern": SPLIT_PATTERN,
        "special_tokens": SPECIAL_TOKENS,
        "max_chars": settings.max_chars,
        "doc_cap": settings.doc_cap,
        "vocab_size": settings.vocab_size,
    }
    key = sha256_hex(json.dumps(inputs, sort_keys=True).encode())
    path = tokenizer_dir() / FILE_NAME
    existing = _existing(path)
    if existing is not None and existing.training.get("inputs") == key and not settings.force:
        print(f"{path} is already trained on this text with these settings; keeping it")
        return existing
    check_writable(path.parent)
    print(f"training a tokenizer of {settings.vocab_size:,} tokens on {source.description}")
    counts = {"documents": 0, "characters": 0}
    began = time.monotonic()
    with _TrainProgress(counts) as progress:
        texts = _counted(text_iterator(source.train.iterate(), settings.doc_cap, settings.max_chars), counts)
        tokenizer = Tokenizer.train(texts, settings.vocab_size, progress)
    seconds = time.monotonic() - began
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP)) != ROUND_TRIP:
        raise TokenizerError("the trained tokenizer does not give text back exactly; please report this")
    tokenizer.training.update(
        counts,
        inputs=key,
        source=source.description,
        recipe=settings.recipe,
        doc_cap=settings.doc_cap,
        max_chars=settings.max_chars,
        seconds=round(seconds, 3),
        repairs=source.train.stats.as_dict(),
    )
    if existing is not None and existing.hash != tokenizer.hash:
        aside = path.with_name(f"tokenizer-{existing.hash[:12]}.json")
        write_atomic(aside, path.read_bytes())
        print(f"the tokenizer that was there is now {aside.name}; models trained with it need it")
    tokenizer.save()
    print(report(tokenizer))
    print(f"saved to {path}")
    return tokenizer


def main(argv: list[str]) -> int:
    """The command line. Exit status: 0 trained or there already, 1 error, 2 bad flags, 130 stopped by Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = parse_settings(argv)

    def action() -> None:
        train_tokenizer(settings)

    return errors.exit_status(action)


def report(tokenizer: Tokenizer) -> str:
    """What is worth knowing about a trained tokenizer, one fact a line."""
    training = tokenizer.training
    lengths = tokenizer.token_bytes()
    lengths = lengths[lengths > 0]
    rate = training["characters"] / max(training["seconds"], 1e-9) / 1e6
    facts: dict[str, Any] = {
        "vocabulary": f"{tokenizer.vocab_size:,} tokens, {len(tokenizer.special_tokens)} of them special",
        "text": f"{training['characters']:,} characters in {training['documents']:,} documents",
        "time": f"{training['seconds']:.1f} s ({rate:.1f} M characters/s)",
        "bytes per token": f"min {lengths.min()}, max {lengths.max()}, mean {lengths.mean():.3f}, "
        f"std {np.std(lengths, ddof=1):.3f}",
        "hash": tokenizer.hash[:12],
    }
    repairs = training["repairs"]
    if repairs["invalid_utf8"] or repairs["bad_lines"]:
        facts["repaired"] = f"{repairs['invalid_utf8']} invalid UTF-8 sequences, {repairs['bad_lines']} lines left out"
    if "warning" in training:
        facts["warning"] = training["warning"]
    return "\n".join(f"  {name}: {fact}" for name, fact in facts.items())


def _existing(path: Path) -> Tokenizer | None:
    if not path.is_file():
        return None
    try:
        return Tokenizer.load(path.parent)
    except TokenizerError as error:
        print(f"{error}: training it anew", file=sys.stderr)
        return None


def _counted(texts: Iterable[str], counts: dict[str, int]) -> Iterator[str]:
    for text in texts:
        counts["documents"] += 1
        counts["characters"] += len(text)
        yield text


class _TrainProgress(Live):
    """Shows the trainer's two stages: reading text (of unknown length) and merging."""

    def __init__(self, counts: dict[str, int]):
        super().__init__("tokenizer", "")
        self._counts = counts

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "count":
            characters = self._counts["characters"] / 1e6
            text = f"reading: {self._counts['documents']:,} documents, {characters:,.1f} M characters"
        else:
            text = f"merging: {done:,} of {total:,}"
        self.show(done, text, "tokenizer", total or None)
