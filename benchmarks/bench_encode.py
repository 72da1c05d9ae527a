"""Encoding many documents: rustbpe's `encode_to_numpy` against tiktoken's batch encoding, on the same text, in turn.

    python -m benchmarks.bench_encode --data PATH... [--competitors DIR]

The vocabulary is trained on the text itself first. Each round runs every encoder once; the table shows medians, and
"first" is the first call, before anything is remembered. All ids are compared with tiktoken's.

gigatoken (optional: `pip install --target DIR gigatoken==0.10.0`, then --competitors DIR) knows no pattern with numbers
of at most two digits, so it is compared, in speed and in ids, with ours on GPT-4's pattern, of at most three.
"""

import base64
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

import rustbpe
from benchmarks.common import read_texts, text_parser

THREE_DIGITS = rustbpe.DEFAULT_PATTERN.replace("{1,2}", "{1,3}")


def load_gigatoken(ranks: list[tuple[bytes, int]], folder: Path | None) -> Any:
    """gigatoken's tokenizer for these ranks, or None with a message."""
    if folder:
        sys.path.append(str(folder))
    try:
        gigatoken = importlib.import_module("gigatoken")
    except ImportError as error:
        print(f"gigatoken: not installed, left out ({error}; see --help for how to install it)")
        return None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "vocabulary.tiktoken"
        path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
        return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt4")


def main() -> None:
    parser = text_parser(__doc__, repeats=5, competitors="gigatoken was")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if not hasattr(rustbpe.Tokenizer, "from_ranks"):
        parser.error("the installed rustbpe is another package of that name: pip uninstall rustbpe, then pip install .")

    texts = read_texts(args.data, args.max_chars)
    chars = sum(map(len, texts))
    print(f"{chars:,} characters in {len(texts):,} documents, vocabulary {args.vocab_size:,}, {args.threads} threads")
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(texts), args.vocab_size)
    ranks = trained.get_mergeable_ranks()
    ours = rustbpe.Tokenizer.from_ranks(ranks, rustbpe.DEFAULT_PATTERN)
    ours_three = rustbpe.Tokenizer.from_ranks(ranks, THREE_DIGITS)
    theirs = tiktoken.Encoding("bench", pat_str=rustbpe.DEFAULT_PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
    dtype = "uint16" if trained.vocab_size <= 65536 else "uint32"
    encoders: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.encode_to_numpy(texts, dtype=dtype, num_threads=args.threads),
        "tiktoken": lambda: theirs.encode_ordinary_batch(texts, num_threads=args.threads),
    }
    gigatoken = load_gigatoken(ranks, args.competitors)
    if gigatoken is not None:
        encoders["ours {1,3}"] = lambda: ours_three.encode_to_numpy(texts, dtype=dtype, num_threads=args.threads)
        encoders["gigatoken {1,3}"] = lambda: gigatoken.encode_batch(texts)

    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    last: dict[str, Any] = {}
    for _ in range(args.repeats):
        for name, encode in encoders.items():
            last.pop(name, None)
            start = time.perf_counter()
            last[name] = encode()
            seconds[name].append(time.perf_counter() - start)

    print(f"\n{'encoder':<17}{'first s':>9}{'median s':>10}{'M chars/s':>11}{'its time/ours':>15}")
    for name, times in seconds.items():
        median = statistics.median(times)
        base = statistics.median(seconds["ours {1,3}" if name.endswith("{1,3}") else "ours"])
        print(f"{name:<17}{times[0]:>9.3f}{median:>10.3f}{chars / median / 1e6:>11.1f}{median / base:>15.2f}")

    flat = np.fromiter((i for ids in last["tiktoken"] for i in ids), dtype=dtype)
    starts = np.cumsum([0, *map(len, last["tiktoken"])])
    same = np.array_equal(last["ours"][0], flat) and np.array_equal(last["ours"][1], starts)
    print(f"ids identical to tiktoken: {same}")
    if gigatoken is not None:
        import awkward  # pyright: ignore[reportMissingImports]

        flat = awkward.to_numpy(awkward.flatten(last["gigatoken {1,3}"]))
        print(f"ids identical to gigatoken: {np.array_equal(last['ours {1,3}'][0], flat)}")
    if not same:
        raise SystemExit("the ids differ")


if __name__ == "__main__":
    main()
