"""Shards: which ones, from where, in what condition; the command that fetches them."""

import hashlib
import json
import socket
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry

from nanochat_jax.data import download
from nanochat_jax.data.download import ShardFetcher, damaged, download_shards, find_list, main, shards_dir
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.shards import (
    DEFAULT_REPO,
    LAST_SHARD,
    Shard,
    ShardList,
    hub_list,
    reference_list,
    shard_name,
    shards_for,
    web_list,
)
from nanochat_jax.data.web import FetchError, OfflineError
from nanochat_jax.text.stock_encodings import stock_encoding
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.paths import offline
from tests.web_server import WebServer

TREE = f"/api/datasets/{DEFAULT_REPO}/tree/main"


def shard_bytes(seed, rows=40):
    """A small parquet file of text."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"document {seed} {i} " * 9 for i in range(rows)]}), buffer, row_group_size=16)
    return buffer.getvalue().to_pybytes()


SHARDS = {shard_name(i): shard_bytes(i) for i in (0, 1, 2, 3, LAST_SHARD)}


def entry(name, content, folder=""):
    sha = hashlib.sha256(content).hexdigest()
    lfs = {"oid": sha, "size": len(content), "pointerSize": 130}
    return {"type": "file", "oid": "0" * 40, "size": len(content), "path": folder + name, "lfs": lfs}


def publish(server, files, path=TREE, folder=""):
    """The hub's listing of these files, among other things, on two pages."""
    entries = [entry(name, content, folder) for name, content in files.items()]
    other = [
        {"type": "file", "oid": "1", "size": 3, "path": "README.md"},
        {"type": "directory", "oid": "2", "path": "x"},
    ]
    server.publish_json(path, [*other, *entries[:1]])
    server.publish_json(path + "?cursor=2", entries[1:])
    server.files.update(files)
    real = server._answer

    def answer(handler):
        if handler.path == path:
            server.plan.insert(0, {"headers": {"Link": f'<{server.url}{path}?cursor=2>; rel="next"'}})
        real(handler)

    server._answer = answer


@pytest.fixture
def server():
    server = WebServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(server, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NANOCHAT_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setattr("nanochat_jax.data.web._sleep", lambda seconds, stop: None)


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.parquet")}


# --- lists ------------------------------------------------------------------------------------------------------------


def test_the_references_names_and_addresses(monkeypatch, server):
    listing = reference_list()
    assert len(listing.shards) == 1823 and len(listing.train) == 1822 and listing.val == shard_name(1822)
    url = f"{server.url}/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_00007.parquet"
    assert listing.url(listing.shards[7]) == url
    monkeypatch.delenv("HF_ENDPOINT")
    assert listing.url(listing.shards[7]).startswith("https://huggingface.co/datasets/karpathy/")
    assert [shard.name for shard in listing.first(2)] == [shard_name(1822), shard_name(0), shard_name(1)]
    assert len(listing.first(-1)) == len(listing.first(5000)) == 1823 and len(listing.first(0)) == 1
    # depth 20: 11.2 G tokens; the reference takes 240 shards for it
    assert shards_for(11.22e9) == 216 and shards_for(1) == 1


def test_the_hubs_list_is_kept(server):
    publish(server, SHARDS)
    listing = find_list(shards_dir())
    assert [shard.name for shard in listing.shards] == sorted(SHARDS) and listing.val == shard_name(LAST_SHARD)
    for shard in listing.shards:
        assert shard.sha256 == hashlib.sha256(SHARDS[shard.name]).hexdigest() and shard.size == len(SHARDS[shard.name])
    asked = len(server.requests)
    assert asked == 2 and find_list(shards_dir()) == listing == ShardList.load(shards_dir())
    assert len(server.requests) == asked
    (shards_dir() / "shards.json").write_text("{")
    with pytest.raises(DataError, match="shards.json is damaged.*delete it"):
        find_list(shards_dir())


def test_any_repository_and_folder(server, capsys):
    files = {f"{i:03d}_00000.parquet": shard_bytes(i) for i in range(3)}
    publish(server, files, "/api/datasets/some/thing/tree/v2/sample/10BT", "sample/10BT/")
    options = ["--repo=some/thing", "--folder=sample/10BT", "--revision=v2", "-n", "-1"]
    assert main(options) == 0
    place = shards_dir().with_name("some--thing--sample--10BT")
    assert files_in(place) == files and ShardList.load(place).val == "002_00000.parquet"  # type: ignore[union-attr]
    assert server.paths()[-1].startswith("/datasets/some/thing/resolve/v2/sample/10BT/0")
    assert "3 of 3 shards are in" in capsys.readouterr().out


def test_a_list_on_any_web_server(server, tmp_path):
    listing = ShardList("", tuple(Shard(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in SHARDS.items()), "x")
    listing = ShardList("", listing.shards, shard_name(1))
    (tmp_path / "made").mkdir()
    listing.save(tmp_path / "made")
    server.files = {**SHARDS, "shards.json": (tmp_path / "made" / "shards.json").read_bytes()}
    assert main([f"--list={server.url}/corpus/shards.json", "-n", "2", f"--out={tmp_path / 'here'}"]) == 0
    assert set(files_in(tmp_path / "here")) == {shard_name(0), shard_name(1), shard_name(2)}
    assert "/corpus/shard_00002.parquet" in server.paths()
    assert web_list(server.url + "/corpus/shards.json").url(listing.shards[0]).startswith(server.url + "/corpus/")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda c: c["shards"].pop(), "1 parquet files; at least two"),
        (lambda c: c["shards"][0].update(name="../../x.parquet"), "no plain name"),
        (lambda c: c["shards"][0].update(name="b.parquet"), "occurs twice"),
        (lambda c: c["shards"][0].update(sha256=None), "a.parquet has no SHA-256"),
        (lambda c: c["shards"][0].pop("size"), "missing: KeyError..size"),
        (lambda c: c.update(val="c.parquet"), "held-out file 'c.parquet' is not in the list"),
        (lambda c: c.update(version=9), "its format is"),
        (lambda c: c.clear(), "missing"),
    ],
)
def test_lists_that_cannot_be(server, tmp_path, change, reason):
    ShardList("", (Shard("a.parquet", 1, "0" * 64), Shard("b.parquet", 1, "1" * 64)), "b.parquet").save(tmp_path)
    content = json.loads((tmp_path / "shards.json").read_text())
    change(content)
    server.publish_json("/shards.json", content)
    with pytest.raises(FetchError, match=f"is no list of shards .*{reason}"):
        web_list(server.url + "/shards.json")


def test_hub_answers_that_are_no_list(server):
    for answer, reason in (({"error": "gone"}, "no list of files: .*gone"), ([{"type": "file"}], "without 'path'")):
        server.publish_json(TREE, answer)
        with pytest.raises(FetchError, match=reason):
            hub_list()
    server.publish_json(TREE, [])
    with pytest.raises(FetchError, match="fineweb-edu-100b-shuffle: 0 parquet files"):
        hub_list()
    with pytest.raises(FetchError, match="HTTP 404"):
        find_list(shards_dir().with_name("other"), "other/repo")


# --- the command ------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_and_the_held_out_one(server, capsys):
    publish(server, SHARDS)
    assert main(["-n", "2", "-w", "2"]) == 0
    assert set(files_in(shards_dir())) == {shard_name(0), shard_name(1), shard_name(LAST_SHARD)}
    assert all(SHARDS[name] == content for name, content in files_in(shards_dir()).items())
    asked = len(server.requests)
    assert main(["-n", "2"]) == 0 and len(server.requests) == asked  # nothing is fetched twice
    assert "3 of 3 shards" in capsys.readouterr().out
    assert main(["--tokens=1.5e8"]) == 0 and shard_name(2) in files_in(shards_dir())


def test_another_hub_by_flag(server, monkeypatch):
    publish(server, SHARDS)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["-n", "1", f"--endpoint={server.url}"]) == 0 and len(files_in(shards_dir())) == 2


def test_a_list_with_some_checksums_is_not_kept(server, caplog):
    publish(server, SHARDS)
    listed = json.loads(server.files[TREE])
    del listed[-1]["lfs"]  # kept in git itself, as small files are
    server.publish_json(TREE, listed)
    assert main(["-n", "2"]) == 0 and not (shards_dir() / "shards.json").exists()
    assert "files without a checksum" in caplog.text


def test_a_mirror_without_lists(server, caplog, capsys):
    server.files = dict(SHARDS)
    assert main(["-n", "2"]) == 0
    assert "without checksums" in caplog.text and not (shards_dir() / "shards.json").exists()
    asked = len(server.requests)
    assert main(["-n", "2"]) == 0 and len(server.requests) == asked
    server.plan = [{}, {"body": b"<html>please log in</html>"}]
    assert main(["-n", "3"]) == 1
    assert "no parquet file but a web page; check HF_ENDPOINT and your proxy" in capsys.readouterr().err
    assert shard_name(2) not in files_in(shards_dir())


def test_anything_missing_gives_an_error_status_and_the_way_on(server, capsys, monkeypatch):
    publish(server, SHARDS)
    del server.files[shard_name(2)]
    server.files[shard_name(1)] = b"<html>please log in</html>"
    assert main(["-n", "3", "--num_workers=1"]) == 1
    shown = capsys.readouterr()
    assert "2 of 4 shards" in shown.out
    assert "shard_00001.parquet: " in shown.err and "26 bytes (application/octet-stream) where" in shown.err
    assert "shard_00002.parquet: " in shown.err and "404" in shown.err
    assert (
        "2 missing: shard_00001.parquet, shard_00002.parquet; to go on: python -m nanochat_jax.data.download -n 3"
        in (shown.err)
    )
    assert set(files_in(shards_dir())) == {shard_name(0), shard_name(LAST_SHARD)}
    server.files.update(SHARDS)
    assert main(["-n", "3"]) == 0


def test_damaged_files_are_found_and_fetched_again(server, capsys):
    publish(server, SHARDS)
    assert main(["-n", "2"]) == 0
    path, name = shards_dir() / shard_name(1), shard_name(1)
    path.write_bytes(SHARDS[name][:-20] + b"?" * 20)
    assert main(["-n", "2"]) == 0 and path.read_bytes() != SHARDS[name]  # the same size: seen only by reading
    listing = ShardList.load(shards_dir())
    assert listing is not None and [shard.name for shard in damaged(listing.first(2), shards_dir())] == [name]
    assert main(["-n", "2", "--verify"]) == 0 and path.read_bytes() == SHARDS[name]
    assert "shard_00001.parquet is damaged; fetching it again" in capsys.readouterr().out
    path.write_bytes(SHARDS[name][:-20])
    assert main(["-n", "2"]) == 0 and path.read_bytes() == SHARDS[name]  # another size: seen at once
    assert damaged([Shard(name)], shards_dir()) == []


def test_too_small_a_disk_is_told_first(server, capsys, monkeypatch):
    publish(server, SHARDS)
    usage = download.shutil.disk_usage("/")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert main(["-n", "2"]) == 1
    assert "3 shards need 0.0 GB" in capsys.readouterr().err
    assert not any("resolve" in path for path in server.paths())


def test_useless_options(capsys):
    assert main(["-n", "1", "-w", "0"]) == 2
    assert "--num_workers" in capsys.readouterr().err


def test_progress_counts_all_files(server, capsys, monkeypatch):
    monkeypatch.setattr("nanochat_jax.utils.progress.LINE_EVERY_S", 0.0)
    publish(server, SHARDS)
    assert main(["-n", "4"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("shards: ")]
    assert "shards: 100% | 5/5 files, 0 MB" in lines[-1] and "MB/s, left 0s" in lines[-1]
    shares = [int(line.split("%")[0].removeprefix("shards: ")) for line in lines]
    assert shares == sorted(shares) and len(set(shares)) > 3


# --- several at once --------------------------------------------------------------------------------------------------


def test_files_come_in_parallel_and_not_more_than_asked(server, tmp_path):
    publish(server, SHARDS)
    server.delay = 0.1
    listing = hub_list()
    assert download_shards(listing, listing.shards, tmp_path, workers=3) == {}
    assert server.most_open == 3 and files_in(tmp_path) == SHARDS


def test_two_downloads_at_once_do_not_disturb_each_other(server, tmp_path):
    publish(server, SHARDS)
    listing = hub_list()
    server.requests.clear()
    server.delay = 0.02
    answers: list[dict[str, str]] = []
    run = lambda: answers.append(download_shards(listing, listing.shards, tmp_path))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [{}, {}, {}] and len(server.requests) == 5 and files_in(tmp_path) == SHARDS


def test_a_fetcher_tries_again_only_when_asked_again(server, tmp_path):
    publish(server, SHARDS)
    listing = hub_list()
    del server.files[shard_name(0)]
    with ShardFetcher(listing, tmp_path) as fetcher:
        with pytest.raises(FetchError, match="shard_00000.parquet: .*404"):
            fetcher.get(listing.shards[0])
        server.files.update(SHARDS)
        assert fetcher.get(listing.shards[0]).read_bytes() == SHARDS[shard_name(0)]
    server.plan = [{"stall": 10}]
    fetcher = ShardFetcher(listing, tmp_path)
    threading.Timer(0.2, fetcher.close).start()
    began = time.monotonic()
    with pytest.raises(FetchError, match="stopped"):
        fetcher.get(listing.shards[1])
    assert time.monotonic() - began < 5


def test_the_token_goes_to_the_named_host_only(server, tmp_path, monkeypatch):
    publish(server, SHARDS)
    monkeypatch.setenv("HF_TOKEN", "secret")
    other = WebServer()
    try:
        other.files = dict(SHARDS)
        listing = hub_list()
        server.plan = [{"status": 302, "headers": {"Location": other.url + "/" + shard_name(0)}}]
        assert download_shards(listing, [listing.shards[0]], tmp_path) == {}
        assert [headers.get("Authorization") for _, headers in server.requests] == ["Bearer secret"] * 3
        elsewhere = ShardList(other.url, listing.shards, listing.val)
        assert download_shards(elsewhere, [listing.shards[1]], tmp_path) == {}
        assert len(other.requests) == 2 and not any("Authorization" in headers for _, headers in other.requests)
    finally:
        other.close()


# --- offline ----------------------------------------------------------------------------------------------------------


def test_offline_mode_opens_no_socket(server, tmp_path, monkeypatch, capsys):
    publish(server, SHARDS)
    assert main(["-n", "1"]) == 0
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)  # whoever makes one fails otherwise than by OfflineError
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert main(["-n", "1"]) == 0  # all there: nothing to refuse
    assert main(["-n", "2"]) == 1
    assert "NANOCHAT_OFFLINE is set, so shard_00001.parquet" in capsys.readouterr().err
    (shards_dir() / "shards.json").unlink()
    assert main(["-n", "1"]) == 0
    assert main(["-n", "2"]) == 1 and "NANOCHAT_OFFLINE" in capsys.readouterr().err
    with pytest.raises(OfflineError):
        download_shards(reference_list(), [Shard("x.parquet")], tmp_path)
    with pytest.raises(ConnectionError, match="offline_test.*TIKTOKEN_CACHE_DIR"):
        stock("offline_test", monkeypatch, tmp_path, "https://somewhere.invalid/x.tiktoken")
    for value, meaning in (("0", False), ("false", False), ("", False), ("yes", True)):
        monkeypatch.setenv("NANOCHAT_OFFLINE", value)
        assert offline() == meaning


def stock(name, monkeypatch, tmp_path, url):
    """Registers a stock encoding with tiktoken that must be fetched from ``url``, and loads it."""

    def construct():
        ranks = tiktoken.load.load_tiktoken_bpe(url)
        special = {"<|endoftext|>": len(ranks)}
        return {"name": name, "pat_str": r"\s+|\S+", "mergeable_ranks": ranks, "special_tokens": special}

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {name: construct})
    return stock_encoding(name)


def test_stock_encodings(server, tmp_path, monkeypatch):
    import base64

    ranks = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell"]
    lines = [base64.b64encode(token) + b" " + str(i).encode() for i, token in enumerate(ranks)]
    server.files = {"x.tiktoken": b"\n".join(lines)}
    original = tiktoken.load.read_file
    stock("stock_test", monkeypatch, tmp_path, server.url + "/x.tiktoken")
    assert tiktoken.load.read_file is original
    tokenizer = Tokenizer.from_tiktoken("stock_test")
    assert tokenizer.encode("hello") == [258, ord("o")] and tokenizer.bos_id == 259 and tokenizer.vocab_size == 260
    assert tokenizer.encode("<|endoftext|>") != [259]
    again = Tokenizer.load(tokenizer.save(tmp_path / "saved").parent)
    assert again.hash == tokenizer.hash and again.bos_id == 259
    with pytest.raises(ValueError, match="nonsense"):
        Tokenizer.from_tiktoken("nonsense")
    with pytest.raises(ConnectionError, match="unreachable_test"):
        stock("unreachable_test", monkeypatch, tmp_path, "http://127.0.0.1:9/x.tiktoken")
