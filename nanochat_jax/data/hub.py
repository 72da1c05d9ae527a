"""Downloads the shards of a data set: the reference's FineWeb-Edu or ClimbMix, or any folder of parquet files.

    python -m nanochat_jax.data.hub -n 8
    python -m nanochat_jax.data.hub -n 8 --repo=climbmix

``-n`` counts training shards (about 250 M characters and 100 MB each); the held-out one always comes with them and is
always the same, however much is downloaded. Training downloads what else it needs while it tokenizes, so this command
need not get everything. ``--repo`` and ``--folder`` name parquet files on the hub, ``--list`` a ``shards.json`` on any
web server. What is compared, and which variables of the environment count: see ``data/fetch.py``.
"""

import contextlib
import logging
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.data.fetch import (
    STAGING,
    FetchError,
    compare,
    fetch,
    fetch_text,
    hub_base,
    list_files,
    refuse_offline,
)
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.shards import LIST_NAME, Shard, ShardList, shards_for
from nanochat_jax.utils import errors
from nanochat_jax.utils.flags import flag, parse
from nanochat_jax.utils.paths import data_dir
from nanochat_jax.utils.progress import Live, time_left

logger = logging.getLogger(__name__)

# The data sets of the recipes, by the name of their folder.
DATASET_OF = {"v1": "fineweb_edu", "modern": "climbmix"}
DATASETS = {"fineweb_edu": "karpathy/fineweb-edu-100b-shuffle", "climbmix": "karpathy/climbmix-400b-shuffle"}
DEFAULT_REPO = DATASETS["fineweb_edu"]


# --- many files -------------------------------------------------------------------------------------------------------


def fetch_ahead(
    listing: ShardList, directory: Path, shards: Sequence[Shard], ahead: int, expected: int | None = None
) -> Iterator[tuple[Shard, "Future[Path]"]]:
    """Every shard and, in time, its file; up to ``ahead`` further ones are being downloaded meanwhile.

    Of those after the first ``expected`` none is begun before its turn.
    """
    files: list[Future[Path]] = []
    limit = len(shards) if expected is None else min(expected, len(shards))
    for number, shard in enumerate(shards):
        while len(files) <= number or len(files) < min(number + 1 + ahead, limit):
            files.append(_in_thread(listing.base, shards[len(files)], directory))
        yield shard, files[number]


def _in_thread(base: str, shard: Shard, directory: Path) -> "Future[Path]":
    file: Future[Path] = Future()

    def work() -> None:
        try:
            file.set_result(fetch(base, shard, directory / shard.name))
        except BaseException as error:  # noqa: B036 - raised by file.result(), where the file is needed
            file.set_exception(error)

    if shard.is_at(directory / shard.name):
        file.set_result(directory / shard.name)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        # A daemon: a process that is told to end does not wait for a server that does not answer.
        threading.Thread(target=work, name=f"download {shard.name}", daemon=True).start()
    return file


def download_shards(
    listing: ShardList,
    shards: Sequence[Shard],
    directory: Path,
    workers: int = 4,
    show: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Downloads shards; returns {name: reason} of those still missing. ``show`` is called twice a second."""
    missing: dict[str, str] = {}
    for shard, file in fetch_ahead(listing, directory, shards, workers - 1):
        while not wait([file], timeout=0.5).done:
            show()
        show()
        if isinstance(error := file.exception(), FetchError):
            missing[shard.name] = str(error)
        elif error is not None:
            raise error
    return missing


def find_list(
    directory: Path, repo: str = DEFAULT_REPO, folder: str = "", revision: str = "main", url: str = ""
) -> ShardList:
    """The list of a data set: the one kept in ``directory``, else asked for and, if it has checksums, kept.

    On the hub these are the parquet files directly in a folder, by name, the last one held out. Raises FetchError.
    """
    if (kept := ShardList.load(directory)) is not None:
        return kept
    refuse_offline(f"the list of files ({LIST_NAME} in {directory})")
    where = url or f"{repo}{f'/{folder}' if folder else ''}"
    try:
        if url:
            listing = ShardList.parse(fetch_text(url)).moved_to(url.rpartition("/")[0])
        else:
            shards = list_files(repo, folder, revision)
            if repo in DATASETS.values():
                shards = [shard for shard in shards if re.fullmatch(r"shard_\d{5}\.parquet", shard.name)]
            listing = ShardList(hub_base(repo, folder, revision), tuple(shards), shards[-1].name if shards else "")
    except ValueError as error:
        raise FetchError(f"{where} has no list of shards ({error})") from error
    if listing.checked:
        directory.mkdir(parents=True, exist_ok=True)
        listing.save(directory)
    else:
        logger.warning("the hub knows no SHA-256 of some files, so all of them have to be there before training")
    return listing


# --- the command ------------------------------------------------------------------------------------------------------


def shards_dir(dataset: str = "fineweb_edu") -> Path:
    """Where one of `DATASETS` goes, below the base directory's data/."""
    return data_dir() / dataset


@dataclass(frozen=True)
class DownloadSettings:
    """Flags."""

    num_files: int = flag(8, "training shards to have, the held-out one comes with them; -1: all (180 GB)", short="n")
    tokens: float = flag(0.0, "instead of num_files: have enough shards for about so many training tokens")
    num_workers: int = flag(4, "download so many files at a time", short="w")
    endpoint: str = flag("", "address of the hub or a mirror of it; default: HF_ENDPOINT, or the hub")
    repo: str = flag(DEFAULT_REPO, "data set on the hub (owner/name, or fineweb_edu, climbmix)", words=DATASETS)
    folder: str = flag("", "folder in it that holds the parquet files")
    revision: str = flag("main", "branch, tag or commit of it")
    list: str = flag("", "instead of repo: address of a shards.json, the files being beside it")
    out: str = flag(
        "", "where to; default: fineweb_edu (or the data set's name) in the base directory's data/", path=True
    )
    verify: bool = flag(False, "read what is there and download damaged files again")

    def directory(self) -> Path:
        """Where the files go."""
        if self.out:
            return Path(self.out)
        if self.list:
            return data_dir() / (self.list.rstrip("/").rsplit("/", 2)[-2].partition(":")[0] or "list")
        for name, repo in DATASETS.items():
            if self.repo == repo and not self.folder:
                return shards_dir(name)
        return data_dir() / "--".join([*self.repo.split("/"), *self.folder.strip("/").split("/")]).rstrip("-")


class FilesProgress(Live):
    """Bytes of ``shards`` that have arrived in ``directory``, read from the disk at every call."""

    def __init__(self, shards: Sequence[Shard], directory: Path):
        self._total = sum(shard.size or 0 for shard in shards)
        super().__init__("shards", "{task.percentage:.0f}%", self._total)
        self._shards, self._directory, self._so_far = shards, directory, 0

    def __call__(self) -> None:
        complete = [shard for shard in self._shards if shard.is_at(self._directory / shard.name)]
        with contextlib.suppress(FileNotFoundError):  # what is on its way may arrive while it is counted
            on_the_way = sum(path.stat().st_size for path in (self._directory / STAGING).rglob("*") if path.is_file())
            self._so_far = max(self._so_far, min(self._total, sum(s.size or 0 for s in complete) + on_the_way))
        rate = self._so_far / max(time.monotonic() - self._began, 1e-9)
        left = time_left((self._total - self._so_far) / rate) if rate > 0 else "?"
        text = f"{len(complete)}/{len(self._shards)} files, {self._so_far / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        share = 100 * self._so_far / max(self._total, 1)
        self.show(self._so_far, f"{text}, left {left}", f"shards: {share:.0f}%")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if anything is missing."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    settings = parse(DownloadSettings, argv, "Downloads shards of pretraining text.")
    if settings.num_workers < 1:
        print("error: --num_workers must be 1 or more", file=sys.stderr)
        return 2
    if settings.endpoint:
        os.environ["HF_ENDPOINT"] = settings.endpoint
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return errors.exit_status(lambda: _download(settings, argv))


def _download(settings: DownloadSettings, argv: Sequence[str]) -> int:
    s, directory = settings, settings.directory()
    listing = find_list(directory, s.repo, s.folder, s.revision, s.list)
    shards = listing.first(shards_for(s.tokens) if s.tokens > 0 else s.num_files)
    if s.verify:
        _remove_damaged(shards, directory)
    todo = [shard for shard in shards if not shard.is_at(directory / shard.name)]
    _check_space(todo, directory)
    missing: dict[str, str] = {}
    if todo:
        with FilesProgress(todo, directory) as show:
            missing = download_shards(listing, todo, directory, s.num_workers, show)
    for name, reason in missing.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    print(f"{len(shards) - len(missing)} of {len(shards)} shards are in {directory} ({listing.val} is held out)")
    if missing:
        again = shlex.join(["python", "-m", "nanochat_jax.data.hub", *argv])
        print(f"error: {len(missing)} missing: {', '.join(missing)}; to resume: {again}", file=sys.stderr)
    return 1 if missing else 0


def _remove_damaged(shards: Sequence[Shard], directory: Path) -> None:
    for shard in shards:
        if shard.is_at(directory / shard.name):
            try:
                compare(directory / shard.name, shard)
            except FetchError:
                print(f"{directory / shard.name} is damaged; downloading it again")


def _check_space(shards: Sequence[Shard], directory: Path) -> None:
    """Raises DataError if the disk cannot hold what is still to come."""
    needed = sum(shard.size or 0 for shard in shards)
    place = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{len(shards)} shards need {needed / 1e9:,.1f} GB in {directory}, {free / 1e9:,.1f} GB are free; free "
            "some space, ask for fewer with -n, or set NANOCHAT_BASE_DIR to a larger disk"
        )


if __name__ == "__main__":
    sys.exit(main())
