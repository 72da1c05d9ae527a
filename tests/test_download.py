import http.server
import os
import socket
import threading
import urllib.parse

import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry

from nanochat_jax.data.download import (
    LAST_SHARD,
    download_shards,
    main,
    shard_name,
    shard_url,
    shards_dir,
    wanted_shards,
)
from nanochat_jax.data.fetch import FetchError, OfflineError, fetch_file, stock_encoding
from nanochat_jax.paths import offline
from nanochat_jax.tokenizer import Tokenizer

CONTENT = b"PAR1" + os.urandom(3_000_000) + b"PAR1"


class Server:
    """An HTTP server on this machine whose files may be cut short, refused or changed; it keeps what was asked."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.cut_after: list[int] = []  # the next answers break off after so many bytes
        self.statuses: list[int] = []  # the next answers are these errors
        self.redirect_to: str | None = None
        self.ranges, self.etag = True, '"one"'
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, format, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def answer(self, handler):
        self.requests.append((handler.path, dict(handler.headers)))
        if self.redirect_to:
            handler.send_response(302)
            handler.send_header("Location", self.redirect_to + handler.path)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        name = urllib.parse.unquote(handler.path).rpartition("/")[2]
        status = self.statuses.pop(0) if self.statuses else 200 if name in self.files else 404
        if status != 200:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body, start = self.files[name], 0
        wanted = handler.headers.get("Range")
        if wanted and self.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                handler.send_response(416)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.send_header("ETag", self.etag)
        handler.end_headers()
        limit = self.cut_after.pop(0) if self.cut_after else len(body)
        handler.wfile.write(body[start : start + limit])
        if limit < len(body) - start:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(server, tmp_path, monkeypatch):
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NANOCHAT_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_names_and_addresses(monkeypatch, server):
    assert shard_url(7) == f"{server.url}/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_00007.parquet"
    monkeypatch.delenv("HF_ENDPOINT")
    assert shard_url(1822).startswith("https://huggingface.co/datasets/karpathy/")
    assert wanted_shards(3) == [0, 1, 2, LAST_SHARD] and len(wanted_shards(-1)) == 1823
    assert wanted_shards(5000) == wanted_shards(-1) and wanted_shards(0) == [LAST_SHARD]


def test_the_command_fetches_shards_and_the_held_out_one(server, capsys):
    server.files = {shard_name(i): b"PAR1" + bytes([i % 256]) * 1000 + b"PAR1" for i in (0, 1, 2, LAST_SHARD)}
    assert main(["-n", "3", "-w", "2"]) == 0
    assert {path.name: path.read_bytes() for path in shards_dir().glob("[!.]*")} == server.files
    asked = len(server.requests)
    assert main(["-n", "3"]) == 0 and len(server.requests) == asked  # nothing is fetched twice
    assert "4 of 4 shards" in capsys.readouterr().out


def test_two_downloads_at_once_do_not_disturb_each_other(server, tmp_path):
    server.files = {shard_name(i): CONTENT for i in range(4)}
    answers: list[dict[int, str]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(download_shards(range(4), tmp_path, wait=0))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [{}, {}, {}] and len(server.requests) == 4
    assert all((tmp_path / shard_name(i)).read_bytes() == CONTENT for i in range(4))


def test_stopped_between_the_last_byte_and_the_new_name(server, tmp_path):
    (tmp_path / (shard_name(0) + ".arriving")).write_bytes(CONTENT)
    assert download_shards([0], tmp_path) == {} and not server.requests
    assert (tmp_path / shard_name(0)).read_bytes() == CONTENT


def test_anything_missing_gives_an_error_status(server, capsys):
    server.files = {
        shard_name(0): CONTENT,
        shard_name(1): b"<html>please log in</html>",
        shard_name(LAST_SHARD): CONTENT,
    }
    assert main(["-n", "3"]) == 1
    shown = capsys.readouterr()
    assert "2 of 4 shards" in shown.out
    assert "shard_00001.parquet: what the server sent is no parquet file" in shown.err
    assert "shard_00002.parquet" in shown.err and "404" in shown.err
    assert sorted(path.name for path in shards_dir().glob("[!.]*")) == [shard_name(0), shard_name(LAST_SHARD)]


def test_broken_answers_are_continued_by_byte_range(server, tmp_path):
    server.files = {"file": CONTENT}
    server.cut_after = [1_000_000, 500_000]
    seen = []
    fetch_file(server.url + "/file", tmp_path / "file", wait=0, progress=lambda *facts: seen.append(facts))
    assert (tmp_path / "file").read_bytes() == CONTENT
    ranges = [headers.get("Range") for _, headers in server.requests]
    assert ranges[0] is None and ranges[1] == "bytes=1000000-" and ranges[2] == "bytes=1500000-"
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_later_run_goes_on_from_the_part(server, tmp_path):
    server.files = {"file": CONTENT}
    server.cut_after = [100_000] * 5
    with pytest.raises(FetchError, match="5 attempts failed.*run again"):
        fetch_file(server.url + "/file", tmp_path / "file", wait=0)
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").stat().st_size == 500_000
    fetch_file(server.url + "/file", tmp_path / "file", wait=0)
    assert server.requests[-1][1]["Range"] == "bytes=500000-"
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("change", ["etag", "no ranges", "size", "whole part", "no note"])
def test_a_part_of_something_else_is_not_continued(server, tmp_path, change):
    server.files = {"file": CONTENT}
    server.cut_after = [len(CONTENT) - 1] + [0] * 4
    with pytest.raises(FetchError):
        fetch_file(server.url + "/file", tmp_path / "file", wait=0)
    expected = CONTENT
    if change == "etag":
        server.etag = '"two"'
        server.files["file"] = expected = CONTENT[::-1]
    elif change == "no ranges":
        server.ranges = False
    elif change == "size":
        server.files["file"] = expected = CONTENT[:1000]
    elif change == "whole part":
        with open(tmp_path / "file.part", "ab") as part:
            part.write(CONTENT[-1:])
    else:
        (tmp_path / "file.part.json").unlink()
        server.files["file"] = expected = CONTENT[::-1]
    fetch_file(server.url + "/file", tmp_path / "file", wait=0)
    assert (tmp_path / "file").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_passing_errors_are_tried_again_and_final_ones_are_not(server, tmp_path):
    server.files = {"file": CONTENT}
    server.statuses = [503, 429, 500]
    fetch_file(server.url + "/file", tmp_path / "file", wait=0)
    assert len(server.requests) == 4
    server.requests.clear()
    with pytest.raises(FetchError, match="404"):
        fetch_file(server.url + "/nothing", tmp_path / "nothing", wait=0)
    server.statuses = [401]
    with pytest.raises(FetchError, match="HF_TOKEN"):
        fetch_file(server.url + "/file", tmp_path / "other", wait=0)
    assert len(server.requests) == 2
    server.statuses = [503] * 9
    with pytest.raises(FetchError, match="5 attempts"):
        fetch_file(server.url + "/file", tmp_path / "other", wait=0)
    assert len(server.requests) == 7


def test_the_wait_doubles(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("nanochat_jax.data.fetch.time.sleep", waits.append)
    server.statuses = [503] * 5
    with pytest.raises(FetchError):
        fetch_file(server.url + "/file", tmp_path / "file")
    assert waits == [1, 2, 4, 8]


def test_the_token_goes_to_the_named_host_only(server, tmp_path, monkeypatch):
    other = Server()
    try:
        other.files = {shard_name(0): CONTENT}
        server.redirect_to = other.url
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert download_shards([0], tmp_path / "shards", wait=0) == {}
        assert server.requests[0][1]["Authorization"] == "Bearer secret"
        assert "Authorization" not in other.requests[0][1]
    finally:
        other.close()


def test_proxies_are_honoured(server, tmp_path, monkeypatch):
    server.files = {"file": CONTENT}
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    fetch_file("http://somewhere.invalid/file", tmp_path / "file", wait=0)
    assert server.requests[0][0] == "http://somewhere.invalid/file"


def test_offline_mode_opens_no_socket(server, tmp_path, monkeypatch, capsys):
    server.files = {shard_name(i): CONTENT for i in (0, LAST_SHARD)}
    assert main(["-n", "1"]) == 0
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")

    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["-n", "1"]) == 0  # all there: nothing to refuse
    assert main(["-n", "2"]) == 1
    assert "NANOCHAT_OFFLINE" in capsys.readouterr().err
    with pytest.raises(OfflineError):
        fetch_file(server.url + "/file", tmp_path / "file")
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


def test_useless_options(capsys):
    with pytest.raises(SystemExit):
        main(["-n", "1", "-w", "0"])
    assert "--num-workers" in capsys.readouterr().err
