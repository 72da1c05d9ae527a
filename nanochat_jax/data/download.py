"""Shards of pretraining text, fetched in parallel: the reference's FineWeb-Edu, or any folder of parquet files.

    python -m nanochat_jax.data.download -n 8

``-n`` counts training shards (about 250 M characters and 100 MB each); the held-out one always comes with them and is
always the same, however much is fetched. Training fetches what else it needs while it runs, so this command need not
get everything. ``--repo`` and ``--folder`` name parquet files on the hub, ``--list`` a ``shards.json`` on any web
server. ``HF_ENDPOINT`` (or ``--endpoint``) names another hub, ``HF_TOKEN`` a token for it; ``NANOCHAT_OFFLINE=1``
refuses.
"""

import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.data.fetch import fetch_file, part_of
from nanochat_jax.data.shards import (
    DEFAULT_REPO,
    LIST_NAME,
    Shard,
    ShardList,
    check_parquet,
    hub_list,
    reference_list,
    shards_for,
    token_for,
    web_list,
)
from nanochat_jax.data.web import FetchError, FinalError, Stopped, refuse_offline
from nanochat_jax.utils import errors
from nanochat_jax.utils.flags import flag, parse
from nanochat_jax.utils.paths import data_dir, sha256_file
from nanochat_jax.utils.progress import Live, time_left

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


def shards_dir() -> Path:
    """Where the default data set goes: fineweb_edu below the base directory's data/."""
    return data_dir() / "fineweb_edu"


def is_there(shard: Shard, directory: Path) -> bool:
    """Whether a shard is on the disk in its full size. (It gets its name only after its checksum has been compared.)"""
    path = directory / shard.name
    return path.is_file() and shard.size in (None, path.stat().st_size)


class ShardFetcher:
    """Fetches shards of a list in threads of its own, in the order in which they are asked for.

    ``ask`` returns at once, ``get`` waits. ``report(name, done_bytes, total_bytes)`` is called from several threads. A
    context manager; leaving it stops the threads, what has arrived of a file is kept.
    """

    def __init__(
        self, listing: ShardList, directory: Path, workers: int = 4, report: Report | None = None, wait: float = 1.0
    ):
        self.listing, self.directory, self._workers, self._report, self._wait = (
            listing,
            directory,
            workers,
            report,
            wait,
        )
        self._queue: deque[Shard] = deque()
        self._asked: set[str] = set()
        self._failed: dict[str, str] = {}
        self._threads = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()

    def __enter__(self) -> "ShardFetcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops fetching, without waiting for a slow server to notice."""
        self._stop.set()
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()

    def ask(self, shards: Iterable[Shard]) -> None:
        """Begins to fetch those that are not there. Raises OfflineError if that is refused."""
        with self._changed:
            for shard in shards:
                if shard.name in self._asked or is_there(shard, self.directory):
                    continue
                refuse_offline(f"{shard.name} (wanted in {self.directory})")
                self.directory.mkdir(parents=True, exist_ok=True)
                self._asked.add(shard.name)
                self._failed.pop(shard.name, None)
                self._queue.append(shard)
                if self._threads < self._workers:
                    self._threads += 1
                    # Daemons: a process that is told to end does not wait for a server that does not answer.
                    threading.Thread(target=self._work, name=f"fetch-{self._threads}", daemon=True).start()
            self._changed.notify_all()

    def get(self, shard: Shard) -> Path:
        """The shard's file, when it is there. Raises FetchError; the next ``get`` then tries again."""
        self.ask([shard])
        with self._changed:
            while not is_there(shard, self.directory):
                if self._stop.is_set():
                    raise Stopped("stopped")
                if shard.name in self._failed:
                    raise FetchError(f"{shard.name}: {self._failed[shard.name]}")
                self._changed.wait(1.0)
        return self.directory / shard.name

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._stop.is_set() or not self._queue:
                    self._threads -= 1
                    return
                shard = self._queue.popleft()
            problem = None
            try:
                self._fetch(shard)
            except Exception as error:  # whatever it is, it belongs to the one who asked
                problem = str(error) or type(error).__name__
            with self._changed:
                self._asked.discard(shard.name)
                if problem is not None:
                    self._failed[shard.name] = problem
                self._changed.notify_all()

    def _fetch(self, shard: Shard) -> None:
        path, url, began = self.directory / shard.name, self.listing.url(shard), time.monotonic()
        if path.is_file():  # in another size than it should have
            logger.warning("%s is damaged or an older one; fetching it again", path)
            path.unlink()

        def progress(done: int, total: int) -> None:
            if self._report is not None:
                self._report(shard.name, done, total)

        fetch_file(url, path, token_for(url), progress, self._wait, shard.wanted(), self._stop)
        seconds = max(time.monotonic() - began, 1e-9)
        logger.info("fetched %s (%.1f MB in %.0f s)", shard.name, path.stat().st_size / 1e6, seconds)


def download_shards(
    listing: ShardList,
    shards: Sequence[Shard],
    directory: Path,
    workers: int = 4,
    report: Report | None = None,
    wait: float = 1.0,
) -> dict[str, str]:
    """Fetches shards that are not there yet; returns {name: reason} of those still missing (empty: all is well).

    Raises OfflineError if anything would have to be fetched in offline mode.
    """
    missing: dict[str, str] = {}
    with ShardFetcher(listing, directory, workers, report, wait) as fetcher:
        fetcher.ask(shards)
        for shard in shards:
            try:
                fetcher.get(shard)
            except FetchError as error:
                missing[shard.name] = str(error).removeprefix(f"{shard.name}: ")
    return missing


def find_list(
    directory: Path,
    repo: str = DEFAULT_REPO,
    folder: str = "",
    revision: str = "main",
    url: str = "",
    wait: float = 1.0,
) -> ShardList:
    """The list of a data set: the one kept in ``directory``, else asked for and, if it has checksums, kept.

    A mirror may be unable to list the default data set: then its files are known by their names, without checksums,
    and the list is not kept. Raises FetchError.
    """
    if (kept := ShardList.load(directory)) is not None:
        return kept
    refuse_offline(f"the list of files ({LIST_NAME} in {directory})")
    try:
        listing = web_list(url, wait) if url else hub_list(repo, folder, revision, wait)
    except FinalError as error:
        if url or repo != DEFAULT_REPO or "HTTP 404" not in str(error):
            raise
        logger.warning("this server has no list of files, so they come without checksums and only before training")
        return reference_list()
    if listing.checked:
        directory.mkdir(parents=True, exist_ok=True)
        listing.save(directory)
    else:
        logger.warning("the list has files without a checksum, so all of them have to be there before training")
    return listing


def damaged(shards: Sequence[Shard], directory: Path) -> list[Shard]:
    """Those shards on the disk whose contents are not what the list (or, without a checksum, parquet) says."""

    def wrong(shard: Shard) -> bool:
        path = directory / shard.name
        if shard.sha256:
            return sha256_file(path) != shard.sha256
        try:
            return check_parquet(path) is not None
        except FetchError:
            return True

    return [shard for shard in shards if (directory / shard.name).is_file() and wrong(shard)]


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownloadSettings:
    """Flags of the command."""

    num_files: int = flag(8, "training shards to have, the held-out one comes with them; -1: all (180 GB)", short="n")
    tokens: float = flag(0.0, "instead of num_files: have enough shards for about so many training tokens")
    num_workers: int = flag(4, "fetch so many files at a time", short="w")
    endpoint: str = flag("", "address of the hub or a mirror of it; default: HF_ENDPOINT, or the hub")
    repo: str = flag(DEFAULT_REPO, "data set on the hub (owner/name)")
    folder: str = flag("", "folder in it that holds the parquet files")
    revision: str = flag("main", "branch, tag or commit of it")
    list: str = flag("", "instead of repo: address of a shards.json, the files being beside it")
    out: str = flag("", "where to; default: fineweb_edu (or the data set's name) in the base directory's data/")
    verify: bool = flag(False, "read what is there and fetch damaged files again")

    def directory(self) -> Path:
        """Where the files go."""
        if self.out:
            return Path(self.out).expanduser()
        if self.list:
            return data_dir() / (self.list.rstrip("/").rsplit("/", 2)[-2].partition(":")[0] or "list")
        if self.repo == DEFAULT_REPO and not self.folder:
            return shards_dir()
        return data_dir() / "--".join([*self.repo.split("/"), *self.folder.strip("/").split("/")]).rstrip("-")


class FilesProgress(Live):
    """Bytes over all files: call it with (name, bytes of this file so far, its size or 0), from any thread."""

    def __init__(self, files: int, total: int | None):
        super().__init__("shards", "{task.percentage:.0f}%" if total else "", total)
        self._files, self._total, self._lock = files, total, threading.Lock()
        self._done: dict[str, int] = {}
        self._before = self._complete = 0  # bytes of earlier runs; whole files

    def __call__(self, name: str, done: int, total: int) -> None:
        with self._lock:
            if name not in self._done:
                self._before += max(0, done - 1024 * 1024)  # of the first report, all but its own chunk
            self._done[name] = done
            self._complete += bool(total) and done >= total
            so_far = sum(self._done.values())
            seconds = max(time.monotonic() - self._began, 1e-9)
            rate = (so_far - self._before) / seconds
            text = f"{self._complete}/{self._files} files, {so_far / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
            if self._total:
                left = (self._total - so_far) / rate if rate > 0 else 0.0
                self.show(so_far, f"{text}, left {time_left(left)}", f"shards: {100 * so_far / self._total:.0f}%")
            else:
                self.show(so_far, text, "shards")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if anything is missing."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    settings = parse(DownloadSettings, argv, "Fetches shards of pretraining text.")
    if settings.num_workers < 1:
        print("error: --num_workers must be 1 or more", file=sys.stderr)
        return 2
    if settings.endpoint:
        os.environ["HF_ENDPOINT"] = settings.endpoint
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return errors.exit_status(lambda: _download(settings, argv))


def _download(settings: DownloadSettings, argv: Sequence[str]) -> int:
    directory = settings.directory()
    s = settings
    listing = _list_of(s, directory)
    shards = listing.first(shards_for(s.tokens) if s.tokens > 0 else s.num_files)
    if s.verify:
        for shard in damaged(shards, directory):
            print(f"{directory / shard.name} is damaged; fetching it again")
            (directory / shard.name).unlink()
    todo = [shard for shard in shards if not is_there(shard, directory)]
    _check_space(todo, directory)
    total = sum(shard.size or 0 for shard in todo) if all(shard.size for shard in todo) else None
    with FilesProgress(len(todo), total) as progress:
        missing = download_shards(listing, todo, directory, s.num_workers, progress) if todo else {}
    for name, reason in missing.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    print(f"{len(shards) - len(missing)} of {len(shards)} shards are in {directory} ({listing.val} is held out)")
    if missing:
        again = shlex.join(["python", "-m", "nanochat_jax.data.download", *argv])
        print(f"error: {len(missing)} missing: {', '.join(missing)}; to go on: {again}", file=sys.stderr)
    return 1 if missing else 0


def _list_of(settings: DownloadSettings, directory: Path) -> ShardList:
    s = settings
    if ShardList.load(directory) is None and (directory.is_dir() and (present := sorted(directory.glob("*.parquet")))):
        # Files from before there were lists, or from a mirror without: when all that is asked for is there, ask nobody.
        listing = reference_list()
        shards = listing.first(shards_for(s.tokens) if s.tokens > 0 else s.num_files)
        if (
            not s.list
            and s.repo == DEFAULT_REPO
            and {shard.name for shard in shards} <= {path.name for path in present}
        ):
            return listing
    return find_list(directory, s.repo, s.folder, s.revision, s.list)


def _check_space(shards: Sequence[Shard], directory: Path) -> None:
    """Raises FetchError if the disk cannot hold what is still to come."""

    def arrived(shard: Shard) -> int:
        part = part_of(directory / shard.name)
        return part.stat().st_size if part.is_file() else 0

    needed = sum(shard.size - arrived(shard) for shard in shards if shard.size)
    place = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise FetchError(
            f"{len(shards)} shards need {needed / 1e9:,.1f} GB in {directory}, {free / 1e9:,.1f} GB are free; free "
            "some space, ask for fewer with -n, or set NANOCHAT_BASE_DIR to a larger disk"
        )


if __name__ == "__main__":
    sys.exit(main())
