"""Where rows come from: local folders in the documented layout, and the hub's parquet files over HTTP."""

import gzip
import json
import socket
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tasks
from nanochat_jax.data.fetch import FetchError, OfflineError
from nanochat_jax.data.readers import DataError
from tasks import spelling
from tasks.hub import Source, fetch_rows, find_local, load_rows, task_data_dir
from tasks.records import Rows
from tests.web_server import HubServer, no_real_network

GSM8K = Source("openai/gsm8k", "main", ("question", "answer"), ("gsm8k",))
ROWS = [{"question": f"q{i}", "answer": f"a #### {i}"} for i in range(7)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    no_real_network(monkeypatch)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


# --- local folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "gsm8k/train.jsonl",
        "GSM8K/train.jsonl.gz",
        "gsm8k/train.parquet",
        "gsm8k/gsm8k_train.jsonl",
        "gsm8k/main/train-00000-of-00001.parquet",
        "gsm8k/train/anything.parquet",
        "openai--gsm8k/main/train/00000.parquet",
    ],
)
def test_places_of_a_local_file(tmp_path, place):
    path = write(tmp_path / place, ROWS)
    write(path.with_name("other.txt.jsonl"), ROWS) if "train/" not in place else None
    assert find_local(GSM8K, "train", tmp_path) == [path]
    rows = load_rows(GSM8K, "train", tmp_path)
    assert len(rows) == 7 and [rows[i] for i in range(7)] == ROWS
    with pytest.raises(FileNotFoundError, match="openai/gsm8k.*gsm8k/test.jsonl"):
        find_local(GSM8K, "test", tmp_path)


def test_rows_of_several_files_follow_each_other(tmp_path):
    for i, part in enumerate((ROWS[:3], ROWS[3:4], ROWS[4:])):
        write(tmp_path / f"gsm8k/main/train-0000{i}-of-00003.parquet", part)
    rows = load_rows(GSM8K, "train", tmp_path)
    assert [rows[i] for i in range(7)] == ROWS and len(rows.sha256) == 3
    assert rows.name_of(5).endswith("train-00002-of-00003.parquet: row 1")


def test_a_split_is_never_mixed_up_with_another(tmp_path):
    source = Source("cais/mmlu", "all", ("question",), ("mmlu",))
    splits = ("auxiliary_train", "dev", "test", "validation")
    for name in splits:
        write(tmp_path / f"mmlu/all/{name}-00000-of-00001.parquet", [{"question": name}])
    for name in splits:
        assert load_rows(source, name, tmp_path)[0] == {"question": name}
    with pytest.raises(FileNotFoundError):
        find_local(source, "train", tmp_path)
    # ARC's subsets never stand in for each other.
    write(tmp_path / "ai2_arc/ARC-Easy/test.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": "A"}])
    write(tmp_path / "ai2_arc/test.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": "A"}])
    assert len(tasks.load("ARC-Easy", "test", tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match="ARC-Challenge/test.jsonl"):
        tasks.load("ARC-Challenge", "test", tmp_path)


def test_missing_data_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="--task_data=.*nowhere"):
        tasks.load("GSM8K", "train", tmp_path / "nowhere")
    for name in tasks.NAMES[:6]:
        with pytest.raises(FileNotFoundError, match="/test.jsonl .*columns"):
            tasks.load(name, "test", tmp_path)


def test_a_split_in_two_kinds_of_file(tmp_path):
    write(tmp_path / "gsm8k/train.jsonl", ROWS)
    write(tmp_path / "gsm8k/train.parquet", ROWS)
    with pytest.raises(DataError, match="train.jsonl, train.parquet"):
        load_rows(GSM8K, "train", tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_missing_columns_are_named(tmp_path, suffix):
    write(tmp_path / f"gsm8k/train{suffix}", [{"question": "q", "solution": "s"}])
    with pytest.raises(DataError, match=f"train{suffix}.*'answer'.*question, solution"):
        load_rows(GSM8K, "train", tmp_path)
    write(tmp_path / f"ARC-Easy/train{suffix}", [{"question": "q", "choices": ["a"]}])
    with pytest.raises(DataError, match="'answerKey'.*question, choices"):
        tasks.load("ARC-Easy", "train", tmp_path)
    write(tmp_path / f"mmlu/auxiliary_train{suffix}", [{"train": {"question": "q"}}])
    with pytest.raises(DataError, match="'choices'.*question"):
        tasks.load("MMLU", "train", tmp_path)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("train.jsonl", b'{"question": "q", "answer": "a"}\n\n{"question": "q"\n', ":3: "),
        ("train.jsonl", b"[1]\n", ":1: "),
        ("train.jsonl", b"\n", "no rows"),
        ("train.jsonl.gz", b"not gzip", ""),
        ("train.jsonl.gz", gzip.compress(bytes(range(99)), mtime=0)[:50], ""),
        ("train.parquet", b"<html>", "parquet"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, reason):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{reason}"):
        load_rows(GSM8K, "train", tmp_path)


def test_nested_parquet_rows_and_only_the_columns_needed(tmp_path):
    inner = [{"question": f"q{i}", "choices": list("abcd"), "answer": i % 4, "subject": ""} for i in range(5)]
    write(tmp_path / "mmlu/auxiliary_train/train-00000-of-00001.parquet", [{"train": row} for row in inner])
    task = tasks.load("MMLU", "train", tmp_path)
    assert [task.rows[i] for i in range(5)] == inner  # pyright: ignore
    path = write(tmp_path / "x.parquet", [{**row, "more": 1} for row in ROWS])
    assert Rows([path], GSM8K.columns)[0] == ROWS[0]


def test_fingerprints_follow_the_content(tmp_path):
    path = write(tmp_path / "a/gsm8k/train.jsonl", ROWS)
    first = tasks.load("GSM8K", "train", tmp_path / "a")
    write(tmp_path / "b/openai--gsm8k/main/train.jsonl", ROWS)
    assert tasks.load("GSM8K", "train", tmp_path / "b").fingerprint() == first.fingerprint()
    assert tasks.load("GSM8K", "train", tmp_path / "b", stop=3).fingerprint() != first.fingerprint()
    write(path.with_name("test.jsonl"), ROWS)
    assert tasks.load("GSM8K", "test", tmp_path / "a").fingerprint() != first.fingerprint()
    write(path, [*ROWS[:-1], {"question": "q6", "answer": "a #### 7"}])
    assert tasks.load("GSM8K", "train", tmp_path / "a").fingerprint() != first.fingerprint()


# --- the hub ----------------------------------------------------------------------------------------------------------


REPO, REVISION = "openai/gsm8k", "refs/convert/parquet"


class Hub(HubServer):
    """A hub on this machine."""

    def publish_split(self, split, parts, tmp_path):
        """Rows of GSM8K's main subset as so many files; returns their addresses."""
        files = {f"{i:04d}.parquet": write(tmp_path / "p.parquet", rows).read_bytes() for i, rows in enumerate(parts)}
        self.publish(REPO, files, f"main/{split}", REVISION)
        return [f"/datasets/{REPO}/resolve/{REVISION}/main/{split}/{name}" for name in files]


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    yield server
    server.close()


def fetched(split="train"):
    return task_data_dir() / "openai--gsm8k" / "main" / split


def test_fetching_a_split(server, tmp_path, monkeypatch):
    paths = server.publish_split("train", [ROWS[:3], ROWS[3:]], tmp_path)
    rows = load_rows(GSM8K, "train")
    assert [rows[i] for i in range(7)] == ROWS
    assert server.downloads() == ["0000.parquet", "0001.parquet"]
    manifest = json.loads((fetched() / "manifest.json").read_text())
    assert {entry["name"]: entry["rows"] for entry in manifest["files"]} == {"00000.parquet": 3, "00001.parquet": 4}
    assert [entry["sha256"] for entry in manifest["files"]] == rows.sha256
    assert [entry["size"] for entry in manifest["files"]] == [len(server.files[path]) for path in paths]
    made = {path.name for path in fetched().iterdir()}
    assert made == {".lock", "00000.parquet", "00001.parquet", "manifest.json"}
    # From now on nothing is asked of the network, and a copy of the folder serves as --task_data.
    server.requests.clear()
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    task = tasks.load("GSM8K", "train")
    assert len(task) == 7 and not server.requests
    assert tasks.load("GSM8K", "train", task_data_dir()).fingerprint() == task.fingerprint()


def test_an_interrupted_download_keeps_complete_files(server, tmp_path):
    paths = server.publish_split("train", [ROWS[:3], ROWS[3:]], tmp_path)
    second = server.files.pop(paths[1])
    with pytest.raises(FetchError, match="openai/gsm8k.*404.*--task_data="):
        fetch_rows(GSM8K, "train")
    assert not (fetched() / "manifest.json").exists()
    with pytest.raises(DataError, match="train"):
        load_rows(GSM8K, "train", task_data_dir())  # never a part of a split as if it were all of it
    server.files[paths[1]] = second
    server.plan = [{}, {"cut": 500}, {"status": 503}]
    server.requests.clear()
    assert fetch_rows(GSM8K, "train") == [fetched() / "00000.parquet", fetched() / "00001.parquet"]
    assert set(server.downloads()) == {"0001.parquet"}, "the first file was downloaded again"
    assert (fetched() / "00001.parquet").read_bytes() == second


def test_a_split_that_changes_between_attempts_is_downloaded_anew(server, tmp_path):
    paths = server.publish_split("train", [ROWS[:3], ROWS[3:]], tmp_path)
    del server.files[paths[1]]
    with pytest.raises(FetchError, match="404"):
        fetch_rows(GSM8K, "train")
    assert (fetched() / "00000.parquet").is_file()
    server.publish_split("train", [ROWS[:2], ROWS[2:5], ROWS[5:]], tmp_path)
    rows = load_rows(GSM8K, "train")
    assert [rows[i] for i in range(7)] == ROWS and server.downloads().count("0000.parquet") == 2


def test_answers_that_are_something_else(server, tmp_path):
    (path,) = server.publish_split("train", [ROWS], tmp_path)
    listing = "/api/datasets/openai/gsm8k/tree/refs/convert/parquet/main/train"
    for place, answer, reason in (
        (listing, b"[]", "main/train"),
        (listing, b"<html>", "HF_ENDPOINT"),
        (path, b"<html>please log in</html>", "0000.parquet.* 26"),
    ):
        good, server.files[place] = server.files[place], answer
        with pytest.raises(FetchError, match=f"openai/gsm8k.*{reason}.*--task_data"):
            fetch_rows(GSM8K, "train")
        assert not (fetched() / "manifest.json").exists()
        server.files[place] = good
    assert len(load_rows(GSM8K, "train")) == 7  # the bad answer is not kept


def test_a_damaged_copy_is_noticed(server, tmp_path):
    server.publish_split("train", [ROWS], tmp_path)
    (path,) = fetch_rows(GSM8K, "train")
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=f"00000.parquet .*{len(good) - 1} .*{len(good)}"):
        load_rows(GSM8K, "train")
    path.write_bytes(write(tmp_path / "x.parquet", ROWS).read_bytes()[:-9] + b"?" * 9)
    with pytest.raises(DataError):
        load_rows(GSM8K, "train")
    position = good.index(b"q3")
    path.write_bytes(good[:position] + b"Q" + good[position + 1 :])  # same size, still parquet
    with pytest.raises(DataError, match="00000.parquet .*damaged"):
        load_rows(GSM8K, "train")
    path.unlink()
    with pytest.raises(DataError, match="00000.parquet .*gone"):
        load_rows(GSM8K, "train")
    (fetched() / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="manifest.json"):
        load_rows(GSM8K, "train")


def test_several_at_once_fetch_once(server, tmp_path):
    server.publish_split("train", [ROWS], tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: len(load_rows(GSM8K, "train")), range(4))) == [7] * 4
    assert server.downloads() == ["0000.parquet"]


def test_offline_says_how_to_get_the_data(server, tmp_path, monkeypatch):
    server.publish_split("train", [ROWS], tmp_path)
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)  # whoever makes one fails otherwise than by OfflineError
    with pytest.raises(OfflineError, match="openai/gsm8k.*NANOCHAT_OFFLINE.*--task_data"):
        load_rows(GSM8K, "train")
    assert not server.requests and not fetched().exists()


def test_every_source_asks_for_the_right_address(server):
    for name, split in zip(tasks.NAMES[:6], ("train", "test", "train", "train", "test", "test"), strict=True):
        with pytest.raises(FetchError, match="404"):
            tasks.load(name, split)
    assert [path.removeprefix("/api/datasets/") for path in map(urllib.parse.unquote, server.paths())] == [
        "allenai/ai2_arc/tree/refs/convert/parquet/ARC-Easy/train",
        "allenai/ai2_arc/tree/refs/convert/parquet/ARC-Challenge/test",
        "cais/mmlu/tree/refs/convert/parquet/all/auxiliary_train",
        "openai/gsm8k/tree/refs/convert/parquet/main/train",
        "openai/openai_humaneval/tree/refs/convert/parquet/openai_humaneval/test",
        "HuggingFaceTB/smol-smoltalk/tree/refs/convert/parquet/default/test",
    ]


def test_words_are_fetched_once(server, monkeypatch):
    server.files["/words_alpha.txt"] = b"cat\r\ndog\r\n"
    monkeypatch.setattr(spelling, "WORDS_URL", server.url + "/words_alpha.txt")
    for _ in range(2):
        assert tasks.load("SpellingBee", "train", size=2).words == ["cat", "dog"]  # pyright: ignore
    assert [path for path, _ in server.requests] == ["/words_alpha.txt"]
