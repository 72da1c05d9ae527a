"""Rows of a data set on the Hugging Face hub, from a local folder or downloaded once.

**A local folder** (``--task_data DIR``) is used alone, nothing is downloaded. It holds, per data set,

    <DIR>/<data set>/<split>*.parquet | .jsonl | .jsonl.gz        (or all files in <DIR>/<data set>/<split>/)

where <data set> is one of the source's ``folders`` (``gsm8k``, ``mmlu``, ``ARC-Easy``, ``humaneval``, ``smoltalk``; any
case), or ``<owner--name>/<subset>`` or ``<name>/<subset>`` as in a copy of the hub's repository. The file name may
start with the folder's name (``mmlu/mmlu_test.jsonl``), and ``val`` is as good as ``validation``. Several files of a
split are read in the order of their names; they must be of one kind.

**Otherwise** the hub's own conversion to parquet (branch ``refs/convert/parquet``) is downloaded (``data/fetch.py``) to
``<base directory>/task_data/<owner--name>/<subset>/<split>/``, complete files being kept after an interruption.
``manifest.json`` (names, sizes, SHA-256, rows) is written last, so a folder with one is complete; sizes and hashes are
checked at every load.
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.data.fetch import STAGING, FetchError, fetch, hub_base, list_files
from nanochat_jax.data.readers import DataError, document_count
from nanochat_jax.data.shards import Shard
from nanochat_jax.utils.paths import base_dir, lock_file, sha256_file, write_atomic
from tasks.records import Row, Rows
from tasks.task import Conversation, Task, TaskError, shuffled_order

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
MANIFEST, LOCK = "manifest.json", ".lock"
REVISION = "refs/convert/parquet"  # where the hub keeps every data set as <subset>/<split>/<number>.parquet


@dataclass(frozen=True)
class Source:
    """One subset of a data set on the hub.

    ``columns`` are those needed, alternatives separated by ``|``. ``wrapper`` names a column that may hold them all
    one level down. ``folders`` are the local folders that hold this subset alone.
    """

    repo: str
    subset: str
    columns: tuple[str, ...]
    folders: tuple[str, ...] = ()
    wrapper: str | None = None

    def local_folders(self) -> list[str]:
        """Folders below ``--task_data`` that may hold this subset, the first that does counts."""
        slug, name = self.repo.replace("/", "--"), self.repo.rpartition("/")[2]
        return [f"{slug}/{self.subset}", f"{name}/{self.subset}", *self.folders]


class HubTask(Task):
    """A task over the rows of a hub data set, in the order of ``common.shuffled_order``."""

    splits: tuple[str, ...] = ()

    def __init__(
        self,
        source: Source,
        split: str,
        task_data: str | Path | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ):
        super().__init__(start, stop, step)
        self.source, self.split = source, split
        self.rows = load_rows(source, split, task_data)
        self._order = shuffled_order(len(self.rows))

    def num_examples(self) -> int:
        return len(self.rows)

    def conversation(self, row: Row) -> Conversation:
        """The conversation of one row. Raises ValueError for a row that cannot be one."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        number = int(self._order[index])
        row = self.rows[number]
        try:
            return self.conversation(row)
        except (TypeError, ValueError, KeyError) as error:
            raise TaskError(f"{self.rows.name_of(number)}: no {self.name} row ({error}): {str(row)[:200]}") from error

    def identity(self) -> dict[str, Any]:
        return {"subset": self.source.subset, "split": self.split, "files": self.rows.sha256}

    @classmethod
    def check_split(cls, split: str) -> None:
        """Raises TaskError for a split this task does not have."""
        if split not in cls.splits:
            raise TaskError(f"{cls.__name__} has no split {split!r}; it has {', '.join(cls.splits)}")


# --- which files ----------------------------------------------------------------------------------------------------


def load_rows(source: Source, split: str, task_data: str | Path | None = None) -> Rows:
    """All rows of a split, from ``task_data`` or (None) the base directory, downloaded first if they are not there.

    Raises FileNotFoundError or FetchError when they cannot be had, saying how to get them, DataError for files that
    are damaged or lack a column.
    """
    paths = find_local(source, split, Path(task_data)) if task_data is not None else fetch_rows(source, split)
    rows = Rows(paths, source.columns, source.wrapper)
    manifest = paths[0].parent / MANIFEST
    if (
        paths[0].parent.name == split and manifest.is_file()
    ):  # a downloaded split: the rows have just been hashed, so compare in full
        for path, digest, entry in zip(paths, rows.sha256, _manifest(manifest), strict=True):
            if digest != entry["sha256"]:
                raise DataError(f"{path} is damaged; delete {path.parent} to have it downloaded again")
    return rows


def find_local(source: Source, split: str, task_data: Path) -> list[Path]:
    """Files of a split below ``task_data``, by the layout of this module. Raises FileNotFoundError or DataError."""
    if not task_data.is_dir():
        raise FileNotFoundError(f"--task_data={task_data} is no folder; make it, or leave the flag out to download")
    for name in source.local_folders():
        folder = _descend(task_data, name)
        if folder is not None and (paths := _files_of_split(folder, split)):
            return paths
    held = ", ".join(sorted(path.name for path in task_data.iterdir())[:12]) or "nothing"
    raise FileNotFoundError(
        f"{task_data} (which holds {held}) has no {split} split of {source.repo} ({source.subset}). Put it there as "
        f"{_layout(source, split)}, or leave --task_data out to download it"
    )


def _layout(source: Source, split: str) -> str:
    folder = source.folders[0] if source.folders else source.local_folders()[0]
    return f"{folder}/{split}.jsonl (or .jsonl.gz, .parquet) with the columns {', '.join(source.columns)}"


def _descend(root: Path, name: str) -> Path | None:
    """The folder ``root``/``name``, upper and lower case being equal."""
    for part in name.split("/"):
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name.lower() == part.lower()]
        if not folders:
            return None
        root = folders[0]
    return root


def _files_of_split(folder: Path, split: str) -> list[Path]:
    names = ("validation", "val") if split == "validation" else (split,)
    for name in names:
        inner = folder / name
        if inner.is_dir():
            if (inner / MANIFEST).is_file():
                return _verified(inner)
            if (inner / LOCK).is_file():
                raise DataError(f"{inner} is an unfinished download; finish it, or delete the folder")
            if paths := _of_one_kind([path for path in inner.iterdir() if _suffix(path)]):
                return paths
    prefix = rf"(?:{re.escape(folder.name)}[-_])?"
    pattern = re.compile(rf"{prefix}(?:{'|'.join(names)})(?:[-_.].*)?", re.IGNORECASE)
    found = [path for path in folder.iterdir() if (end := _suffix(path)) and pattern.fullmatch(path.name[: -len(end)])]
    return _of_one_kind(found)


def _suffix(path: Path) -> str | None:
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    return suffix if suffix and path.is_file() and not path.name.startswith(".") else None


def _of_one_kind(paths: list[Path]) -> list[Path]:
    paths = sorted(paths)
    if len({_suffix(path) for path in paths}) > 1:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{paths[0].parent} has one split in several kinds of file ({names}); keep one of them")
    return paths


# --- downloading ----------------------------------------------------------------------------------------------------


def task_data_dir() -> Path:
    """Where downloaded data sets go: task_data below the base directory."""
    return base_dir() / "task_data"


def fetch_rows(source: Source, split: str) -> list[Path]:
    """Parquet files of a split in the base directory, downloaded if they are not there.

    Raises OfflineError, FetchError or DataError, saying what to do.
    """
    directory = task_data_dir() / source.repo.replace("/", "--") / source.subset / split
    if (directory / MANIFEST).is_file():
        return _verified(directory)
    folder = f"{source.subset}/{split}"
    try:
        listed = list_files(source.repo, folder, REVISION)
        if not listed:
            raise FetchError(f"its branch {REVISION} has no parquet file in {folder}")
        directory.mkdir(parents=True, exist_ok=True)
        with lock_file(directory / LOCK):
            if not (directory / MANIFEST).is_file():  # else another process has downloaded it while this one waited
                _fetch_into(directory, source, split, listed)
    except FetchError as error:
        raise type(error)(
            f"the {split} split of {source.repo} ({source.subset}) cannot be downloaded: {error}. Or give "
            f"--task_data=DIR with {_layout(source, split)}"
        ) from error
    return _verified(directory)


def _fetch_into(directory: Path, source: Source, split: str, listed: list[Shard]) -> None:
    base = hub_base(source.repo, f"{source.subset}/{split}", REVISION)
    files = []
    for number, wanted in enumerate(listed):
        path = directory / f"{number:05d}.parquet"
        if path.is_file() and sha256_file(path) != wanted.sha256:
            path.unlink()  # the split has changed on the hub since an earlier attempt
        logger.info("downloading %s %s, file %d of %d", source.repo, split, number + 1, len(listed))
        fetch(base, wanted, path)
        files.append(
            {
                "name": path.name,
                "size": path.stat().st_size,
                "sha256": sha256_file(path),
                "rows": document_count(path),
            }
        )
    content = {"repo": source.repo, "subset": source.subset, "split": split, "files": files}
    write_atomic(directory / MANIFEST, json.dumps(content, indent=1) + "\n")
    shutil.rmtree(directory / STAGING, ignore_errors=True)


def _verified(directory: Path) -> list[Path]:
    """The files named by the manifest, if they still have their sizes. Raises DataError naming the remedy."""
    remedy = f"delete {directory} to have it downloaded again"
    sizes = {directory / entry["name"]: entry["size"] for entry in _manifest(directory / MANIFEST)}
    for path, size in sizes.items():
        if not path.is_file():
            raise DataError(f"{path} is gone; {remedy}")
        if path.stat().st_size != size:
            raise DataError(f"{path} has {path.stat().st_size} bytes where its manifest says {size}; {remedy}")
    return list(sizes)


def _manifest(path: Path) -> list[dict[str, Any]]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return [{key: entry[key] for key in ("name", "size", "sha256")} for entry in files]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete {path.parent} to have it downloaded again") from error
