"""The reference's pretraining text: shards of FineWeb-Edu, fetched in parallel.

    python -m nanochat_jax.data.download -n 8

``-n`` counts training shards (about 250 M characters and 100 MB each); the last shard of the set, which is held out,
always comes with them, so that validation text stays the same however much is fetched. ``HF_ENDPOINT`` names another
server, ``HF_TOKEN`` a token for it; ``NANOCHAT_OFFLINE=1`` refuses.
"""

import argparse
import concurrent.futures
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from nanochat_jax.data.fetch import FetchError, OfflineError, fetch_file, refuse_offline
from nanochat_jax.data.text import LAST_SHARD
from nanochat_jax.paths import data_dir, lock_file

DATASET = "datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"
DEFAULT_ENDPOINT = "https://huggingface.co"

Report = Callable[[str, int, int], None]


def shard_name(index: int) -> str:
    """File name of a shard, 0 .. 1822."""
    return f"shard_{index:05d}.parquet"


def shard_url(index: int) -> str:
    """Address of a shard, on ``HF_ENDPOINT`` if that is set."""
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    return f"{endpoint}/{DATASET}/{shard_name(index)}"


def shards_dir() -> Path:
    """Where the shards go: fineweb_edu below the base directory's data/."""
    return data_dir() / "fineweb_edu"


def wanted_shards(count: int) -> list[int]:
    """Indices for ``count`` training shards (-1: all of them) and the held-out one."""
    count = LAST_SHARD if count < 0 else min(count, LAST_SHARD)
    return [*range(count), LAST_SHARD]


def download_shards(
    indices: Sequence[int],
    directory: Path | None = None,
    workers: int = 4,
    report: Report | None = None,
    wait: float = 1.0,
) -> dict[int, str]:
    """Fetch shards that are not there yet; returns {index: reason} of those still missing (empty: all is well).

    ``report(name, done_bytes, total_bytes)`` is called from several threads. Raises OfflineError if anything would have
    to be fetched in offline mode.
    """
    directory = directory if directory is not None else shards_dir()

    def absent() -> list[int]:
        return [index for index in indices if not (directory / shard_name(index)).is_file()]

    if not (todo := absent()):
        return {}
    refuse_offline(f"{len(todo)} shards ({shard_name(todo[0])} ...)")
    token = os.environ.get("HF_TOKEN") or None
    stop = threading.Event()

    def fetch(index: int) -> str | None:
        if stop.is_set():
            return "stopped"
        path = directory / shard_name(index)

        def progress(done: int, total: int) -> None:
            if stop.is_set():
                raise FetchError("stopped")
            if report is not None:
                report(path.name, done, total)

        try:
            arriving = path.with_name(path.name + ".arriving")
            if not arriving.is_file():  # else the last run ended between the last byte and the new name
                fetch_file(shard_url(index), arriving, token, progress, wait)
            if not _is_parquet(arriving):
                arriving.unlink()
                return "what the server sent is no parquet file; check HF_ENDPOINT and your proxy"
            os.replace(arriving, path)
        except OSError as error:
            return str(error)
        return None

    missing: dict[int, str] = {}
    directory.mkdir(parents=True, exist_ok=True)
    with lock_file(directory / ".lock"), concurrent.futures.ThreadPoolExecutor(workers) as pool:
        todo = absent()  # another process may have fetched some while this one waited
        futures = {pool.submit(fetch, index): index for index in todo}
        try:
            for future in concurrent.futures.as_completed(futures):
                reason = future.result()
                if reason is not None:
                    missing[futures[future]] = reason
        except BaseException:  # Ctrl-C: parts stay, the next run goes on from them
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return dict(sorted(missing.items()))


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(4)
        file.seek(0, os.SEEK_END)
        if file.tell() < 12:
            return False
        file.seek(-4, os.SEEK_END)
        return head == file.read(4) == b"PAR1"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if anything is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m nanochat_jax.data.download", description="Fetch FineWeb-Edu shards."
    )
    parser.add_argument(
        "-n", "--num-files", type=int, default=-1, help="training shards to have (default -1: all 1822)"
    )
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="fetch so many at a time (default 4)")
    options = parser.parse_args(arguments)
    if options.num_workers < 1:
        parser.error("--num-workers must be 1 or more")
    indices, directory = wanted_shards(options.num_files), shards_dir()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    lock = threading.Lock()
    with Bar(*columns, disable=not sys.stdout.isatty()) as bar:

        def report(name: str, done: int, total: int) -> None:
            with lock:
                if name not in tasks:
                    tasks[name] = bar.add_task(name)
                finished = bool(total) and done >= total
                bar.update(tasks[name], completed=done, total=total or None, visible=not finished)

        try:
            missing = download_shards(indices, directory, options.num_workers, report)
        except OfflineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    for index, reason in missing.items():
        print(f"error: {shard_name(index)}: {reason}", file=sys.stderr)
    print(f"{len(indices) - len(missing)} of {len(indices)} shards are in {directory}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
