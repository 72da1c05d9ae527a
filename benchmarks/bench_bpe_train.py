"""BPE training: rustbpe of this project against the trainers people use, on the same text, in turn.

    python -m benchmarks.bench_bpe_train --data PATH...

Every measurement is a process of its own: it reads the text first, then trains, and reports the seconds of training and
by how much its resident memory peaked above what it was before. The trainers take turns; the table shows medians.

Competitors are optional; one that is not installed is left out with a message. The PyPI package `rustbpe` has the same
module name as ours, so install the competitors in a folder of their own and name it:

    pip install --target DIR rustbpe==0.1.0 gigabpe==0.1.0 tokenizers
    python -m benchmarks.bench_bpe_train --data PATH... --competitors DIR
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.common import read_texts, text_parser

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
ROOT = Path(__file__).resolve().parents[1]
# name -> (import name, from the competitors' folder, what it does differently)
TRAINERS = {
    "ours": ("rustbpe", False, ""),
    "rustbpe-pypi": ("rustbpe", True, "PyPI rustbpe: the same algorithm and pattern"),
    "gigabpe": ("gigabpe", True, "reads the text from a file; GPT-2's pattern; ties broken as Hugging Face does"),
    "tokenizers": ("tokenizers", True, "Hugging Face; ties broken in its own way"),
}


class PeakMemory:
    """Growth of the resident memory while the `with` block runs, in bytes, sampled every five milliseconds."""

    def __enter__(self) -> "PeakMemory":
        self._stop = threading.Event()
        self._before = self.peak = self._resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self._before

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._resident())


def train(name: str, texts: list[str], vocab_size: int, text_file: Path) -> list[str] | None:
    """Trains with one trainer and returns its tokens as hex, where they can be compared with ours."""
    if name in ("ours", "rustbpe-pypi"):
        import rustbpe

        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=PATTERN)
        return [bytes(token).hex() for token, _ in tokenizer.get_mergeable_ranks()]
    if name == "gigabpe":
        import gigabpe  # pyright: ignore[reportMissingImports]

        gigabpe.train_bpe([str(text_file)], vocab_size=vocab_size, pretokenizer="bytelevel")
        return None
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return None


def measure_here(args: argparse.Namespace) -> None:
    """One measurement (in a process started by `main`): prints a line of JSON."""
    text_file = Path(args.text_file)
    texts = [] if args.one == "gigabpe" else read_texts(args.data, args.max_chars)
    with PeakMemory() as memory:
        start = time.perf_counter()
        tokens = train(args.one, texts, args.vocab_size, text_file)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": memory.growth, "tokens": tokens}))


def available(name: str, env: dict[str, str]) -> bool:
    module = TRAINERS[name][0]
    # Ours can be told from PyPI's package by its `from_ranks`.
    check = f"import {module}" + ("; rustbpe.Tokenizer.from_ranks" if name == "ours" else "")
    check += "; assert not hasattr(rustbpe.Tokenizer, 'from_ranks')" if name == "rustbpe-pypi" else ""
    return subprocess.run([sys.executable, "-c", check], env=env, capture_output=True).returncode == 0


def main() -> None:
    parser = text_parser(__doc__, repeats=3, competitors="the competitors were")
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--text-file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure_here(args)

    texts = read_texts(args.data, args.max_chars)
    chars = sum(map(len, texts))
    print(f"{chars:,} characters in {len(texts):,} documents, vocabulary {args.vocab_size:,}, {os.cpu_count()} cores")
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text_file = Path(folder) / "texts.txt"
        text_file.write_text("\n".join(texts), encoding="utf-8")
        del texts
        environments = {}
        for name in args.only:
            env = dict(os.environ)
            if TRAINERS[name][1] and args.competitors:
                env["PYTHONPATH"] = os.pathsep.join([str(args.competitors), env.get("PYTHONPATH", "")])
            if available(name, env):
                environments[name] = env
            else:
                print(f"{name}: not installed, left out (see --help for how to install it)")
        command = [sys.executable, "-m", "benchmarks.bench_bpe_train", f"--text-file={text_file}"]
        command += [f"--max-chars={args.max_chars}", f"--vocab-size={args.vocab_size}"]
        command += ["--data", *(str(path.resolve()) for path in args.data), "--one"]
        for _ in range(args.repeats):
            for name, env in environments.items():
                run = subprocess.run([*command, name], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
                results.setdefault(name, []).append(json.loads(run.stdout.splitlines()[-1]))
                print(f"  {name}: {results[name][-1]['seconds']:.2f} s", flush=True)

    if "ours" not in results:
        raise SystemExit("rustbpe of this project is not installed: pip install . in the project's root")
    ours = statistics.median(r["seconds"] for r in results["ours"])
    our_memory = statistics.median(r["memory"] for r in results["ours"])
    print(
        f"\n{'trainer':<14}{'median s':>10}{'M chars/s':>11}{'peak +MB':>10}{'its time/ours':>15}{'its peak/ours':>15}"
    )
    for name, runs in results.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        memory = statistics.median(r["memory"] for r in runs)
        print(
            f"{name:<14}{seconds:>10.2f}{chars / seconds / 1e6:>11.1f}{memory / 1e6:>10.0f}"
            f"{seconds / ours:>15.2f}{memory / our_memory:>15.2f}   {TRAINERS[name][2]}"
        )
    if "rustbpe-pypi" in results:
        same = results["ours"][0]["tokens"] == results["rustbpe-pypi"][0]["tokens"]
        print(f"merges identical to PyPI rustbpe: {same}")
        if not same:
            raise SystemExit("the merges differ")


if __name__ == "__main__":
    main()
