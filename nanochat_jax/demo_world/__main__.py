"""Prints samples of the demo text: `python -m nanochat_jax.demo_world --split val --count 20`."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice

from nanochat_jax.demo_world import KINDS, facts, make_document, make_world, python_prose


def main(argv: list[str] | None = None) -> int:
    """Parses the flags and prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nanochat_jax.demo_world", description="Print texts of the demo world."
    )
    parser.add_argument("--split", choices=("train", "val"), default="train", help="training or held-out text")
    parser.add_argument("--count", type=int, default=10, help="how many documents (default 10)")
    parser.add_argument("--start", type=int, default=0, help="number of the first document (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="other texts about the same world (default 0)")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="only documents of this kind")
    parser.add_argument("--prose", action="store_true", help="print prose from the Python documentation instead")
    parser.add_argument("--facts", action="store_true", help="print all facts of the world instead")
    args = parser.parse_args(argv)
    if args.count < 0 or args.start < 0:
        parser.error("--count and --start must not be negative")
    if args.facts:
        for fact in facts(make_world(0)):
            print(f"{fact.subject} | {fact.relation} | {fact.object}")
        return 0
    if args.prose:
        for text in islice(python_prose(args.split), args.start, args.start + args.count):
            print(text, end="\n\n")
        return 0
    index, printed = args.start, 0
    while printed < args.count:
        doc = make_document(index, args.split, args.seed)
        if args.kind in (None, doc.kind):
            print(f"--- {args.split} {index}: {doc.kind}\n{doc.text}\n")
            printed += 1
        index += 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
