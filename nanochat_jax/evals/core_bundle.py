"""The CORE bundle: the tasks' items, shots and baselines, from a folder or straight out of the zip file.

    core.yaml             the tasks: label, kind, file, number of shots, what stands between question and answer
    eval_meta_data.csv    what guessing scores in each
    eval_data/<file>      one JSON object a line

It is fetched once into the base directory. The archive is never unpacked, so nothing in it can be written anywhere.
"""

import csv
import io
import json
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nanochat_jax.data.fetch import FetchError, fetch_url
from nanochat_jax.evals.core_prompts import FIELDS, Item
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.paths import base_dir, lock_file, sha256_file, sha256_hex, write_atomic

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
TASKS_FILE, BASELINES_FILE, ITEMS_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"

Place = Path | zipfile.Path


class BundleError(UserError, RuntimeError):
    """The bundle cannot be had or is damaged; the message names the file and the remedy."""


@dataclass(frozen=True)
class CoreTask:
    """One task. `kind` is a key of `core_prompts.FIELDS`, `baseline` what guessing scores, between 0 and 1."""

    label: str
    kind: str
    file: str
    num_fewshot: int
    delimiter: str = " "
    baseline: float = 0.0


@dataclass(frozen=True)
class Bundle:
    """An open bundle. `sha256` is that of the zip file; of a folder it covers both tables and the items' file sizes."""

    place: Place
    tasks: tuple[CoreTask, ...]
    sha256: str

    def items(self, task: CoreTask) -> list[Item]:
        """The items of a task in file order. Raises BundleError naming the file and line of the first bad one."""
        file = self.place / ITEMS_FOLDER / task.file
        items = []
        for number, line in enumerate(_read(file).split("\n"), 1):
            if not line.strip():
                continue
            try:
                items.append(_checked(json.loads(line), task.kind))
            except (ValueError, TypeError, KeyError) as error:
                reason = f"field {error} is missing" if isinstance(error, KeyError) else error
                raise BundleError(f"{file}, line {number}: no {task.kind} item ({reason})") from None
        if not items:
            raise BundleError(f"{file} has no items")
        return items


def open_bundle(path: str | Path | None = None) -> Bundle:
    """Opens a bundle: `path` (folder or zip), or else `eval_bundle` or `eval_bundle.zip` of the base directory.

    If neither is there, the zip is fetched; its hash is kept beside it and checked ever after. Raises BundleError; a
    fetched file that is damaged is set aside, so that the next call fetches it again.
    """
    if path is not None:
        place = Path(path)
        if not place.exists():
            raise BundleError(f"{place} is not there; name the CORE bundle's folder or zip file ({URL})")
    else:
        place = base_dir() / "eval_bundle"
        place = place if place.is_dir() else _fetched()
    if place.is_dir():
        return _open(place, "")
    try:
        return _open(zipfile.Path(place), sha256_file(place))
    except zipfile.BadZipFile as error:
        raise BundleError(f"{place} is no intact zip file ({error}); fetch it again from {URL}") from None


def _fetched() -> Path:
    """The zip in the base directory, fetched if need be, intact and as it was fetched."""
    path = base_dir() / "eval_bundle.zip"
    note = path.with_name(path.name + ".json")
    with lock_file(path.with_name(path.name + ".lock")):
        if not path.is_file():
            try:
                fetch_url(URL, path)
            except FetchError as error:
                raise BundleError(
                    f"the CORE bundle is not in {path} and cannot be downloaded ({error}). Put {URL} there, or its "
                    f"unpacked folder at {path.with_suffix('')}"
                ) from None
            note.unlink(missing_ok=True)
        digest = sha256_file(path)
        noted = json.loads(note.read_text()).get("sha256") if note.is_file() else None
        if noted not in (None, digest):
            raise _set_aside(path, f"its SHA-256 is {digest}, when it was fetched it was {noted}")
        if noted is None:
            try:
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
            except (zipfile.BadZipFile, OSError) as error:
                raise _set_aside(path, f"it is no zip file: {error}") from None
            if broken is not None:
                raise _set_aside(path, f"{broken} in it is damaged")
            write_atomic(
                note, json.dumps({"url": URL, "sha256": digest, "bytes": path.stat().st_size}, indent=1) + "\n"
            )
    return path


def _set_aside(path: Path, why: str) -> BundleError:
    aside = path.with_name(path.name + ".bad")
    os.replace(path, aside)
    path.with_name(path.name + ".json").unlink(missing_ok=True)
    return BundleError(f"{path} is damaged: {why}. It is now {aside.name}; run again to fetch {URL} anew")


def _open(place: Place, digest: str) -> Bundle:
    """A bundle whose files are in `place` or in the one folder of it that has them."""
    if not (place / TASKS_FILE).is_file():
        inner = [p for p in place.iterdir() if p.is_dir() and (p / TASKS_FILE).is_file()]
        if len(inner) != 1:
            raise BundleError(f"{place} has no {TASKS_FILE}, it is not the CORE bundle ({URL})")
        place = inner[0]
    text, table = _read(place / TASKS_FILE), _read(place / BASELINES_FILE)
    try:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(io.StringIO(table))}
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{place / BASELINES_FILE}: cannot read the baselines: {error}") from None
    try:
        tasks = [_task(entry) for entry in yaml.safe_load(text)["icl_tasks"]]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise BundleError(f"{place / TASKS_FILE}: cannot read the tasks: {error!r}") from None
    if missing := [task.label for task in tasks if task.label not in baselines]:
        raise BundleError(f"{place / BASELINES_FILE} has no random baseline for {', '.join(missing)}")
    tasks = tuple(replace(task, baseline=0.01 * baselines[task.label]) for task in tasks)
    if not digest:
        files = [Path(str(place)) / ITEMS_FOLDER / task.file for task in tasks]
        sizes = [f"{file.name} {file.stat().st_size}" for file in files if file.is_file()]
        digest = sha256_hex(text.encode(), table.encode(), "\n".join(sizes).encode())
    return Bundle(place, tasks, digest)


def _task(entry: dict[str, Any]) -> CoreTask:
    kind, file = entry["icl_task_type"], entry["dataset_uri"]
    if kind not in FIELDS:
        raise ValueError(f"{entry['label']} is of kind {kind!r}, known are {', '.join(FIELDS)}")
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise ValueError(f"{entry['label']} names a file outside the bundle: {file}")
    return CoreTask(entry["label"], kind, file, int(entry["num_fewshot"][0]), entry.get("continuation_delimiter", " "))


def _checked(item: Any, kind: str) -> Item:
    """The item, if the prompts of its kind can be made of it. Raises KeyError for a missing field, ValueError."""
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    for name in FIELDS[kind]:
        value = item[name]
        if name in ("choices", "context_options"):
            if not isinstance(value, list) or not value or not all(isinstance(option, str) for option in value):
                raise ValueError(f"{name} must be a list of texts")
            if not isinstance(item["gold"], int) or not 0 <= item["gold"] < len(value):
                raise ValueError(f"gold is {item['gold']!r}, there are {len(value)} {name}")
        elif name != "gold" and not isinstance(value, str):
            raise ValueError(f"{name} must be a text")
    return item


def _read(file: Place) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{file} of the CORE bundle cannot be read ({error}); get it again from {URL}") from None
