"""Files over HTTP: whole, or continued, or refused; never two versions glued together."""

import email.utils
import errno
import hashlib
import io
import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from nanochat_jax.data import fetch, web
from nanochat_jax.data.fetch import Wanted, fetch_file
from nanochat_jax.data.web import FetchError, FinalError, OfflineError, Stopped, fetch_json
from tests import children
from tests.web_server import WebServer

CONTENT = random.Random(0).randbytes(3_000_000)
OTHER = random.Random(1).randbytes(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
KNOWN = Wanted(len(CONTENT), SHA)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NANOCHAT_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    server = WebServer()
    server.files["file"] = CONTENT
    yield server
    server.close()


def get(server, path, **options):
    fetch_file(server.url + "/file", path, wait=0, **options)
    return path.read_bytes()


def begin(server, path, size=1_000_000, place="/file", wanted=None):
    """The first part of the file, as an interrupted process leaves it."""
    stop = threading.Event()

    def progress(done, total):
        if done >= size:
            stop.set()

    server.plan = [{"stall": size}]
    with pytest.raises(Stopped):
        fetch_file(server.url + place, path, wait=0, progress=progress, stop=stop, wanted=wanted)
    server.requests.clear()


# --- broken connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("how", ["cut", "reset", "stall"])
def test_what_breaks_off_is_continued(server, tmp_path, monkeypatch, how, known):
    monkeypatch.setattr(web, "TIMEOUT_S", 0.3)
    server.plan = [{how: 1_000_000}, {how: 500_000}, {how: 700_000}]
    seen = []
    wanted = KNOWN if known else Wanted()
    assert get(server, tmp_path / "file", wanted=wanted, progress=lambda *facts: seen.append(facts)) == CONTENT
    starts = [int((text or "bytes=0-").removeprefix("bytes=")[:-1]) for text in server.ranges()]
    if how != "reset":  # a reset may destroy bytes that have been sent
        assert starts == [0, 1_000_000, 1_500_000, 2_200_000]
    assert starts == sorted(starts) and len(starts) == 4
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_crawling_server_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT_S", 0.3)
    server.plan = [{"crawl": True}]
    assert get(server, tmp_path / "file") == CONTENT
    assert server.ranges()[0] is None and len(server.requests) == 2


def test_a_flaky_line_wins_in_the_end_and_a_dead_one_does_not(server, tmp_path):
    server.plan = [{"cut": 300_000}] * 9  # more than five attempts, each of which gets on
    assert get(server, tmp_path / "file") == CONTENT
    server.plan = [{"cut": 1000}] * 5
    with pytest.raises(FetchError, match="5 attempts failed.*ended after 5000 of 3000000 bytes.*run again to go on"):
        get(server, tmp_path / "other")
    assert not (tmp_path / "other").exists() and (tmp_path / "other.part").stat().st_size == 5000
    server.requests.clear()
    assert get(server, tmp_path / "other") == CONTENT and server.ranges() == ["bytes=5000-"]


def test_nobody_there(tmp_path):
    with pytest.raises(FetchError, match="5 attempts failed.*refused"):
        fetch_file("http://127.0.0.1:9/file", tmp_path / "file", wait=0)


# --- lies -------------------------------------------------------------------------------------------------------------


def test_a_length_that_is_too_long(server, tmp_path):
    server.plan = [{"length": len(CONTENT) + 10}] + [{"status": 416}]
    assert get(server, tmp_path / "file") == CONTENT  # the next answer is honest: nothing of the first one is trusted
    server.plan = [{"length": len(CONTENT) + 10}]
    with pytest.raises(FinalError, match="the server has 3000010 bytes .* where 3000000 are expected"):
        get(server, tmp_path / "known", wanted=KNOWN)


def test_a_length_that_is_too_short(server, tmp_path):
    with pytest.raises(FinalError, match="2999990 bytes .* where 3000000 are expected"):
        server.plan = [{"length": len(CONTENT) - 10}]
        get(server, tmp_path / "sized", wanted=Wanted(len(CONTENT)))
    server.plan = [{"length": len(CONTENT) - 10}]
    with pytest.raises(FinalError, match="no parquet"):  # without a size, what is known of the contents must do

        def check(path):
            raise FetchError("no parquet" if path.stat().st_size < len(CONTENT) else "?")

        get(server, tmp_path / "checked", wanted=Wanted(check=check))
    assert not list(tmp_path.glob("*ed"))


def test_without_a_length(server, tmp_path):
    server.plan = [{"chunked": True, "cut": 1_000_000}, {"chunked": True}]
    assert get(server, tmp_path / "file") == CONTENT


@pytest.mark.parametrize(
    "odd", [{"ranges": False}, {"first": 0}, {"first": 999_990}, {"first": 1_000_010}, {"status": 416}, {"status": 204}]
)
@pytest.mark.parametrize("known", [False, True])
def test_an_answer_that_is_not_the_part_asked_for(server, tmp_path, odd, known):
    wanted = KNOWN if known else Wanted()
    server.plan = [{"cut": 1_000_000}, odd]
    assert get(server, tmp_path / "file", wanted=wanted) == CONTENT


def test_a_proxy_that_packs_things_up(server, tmp_path):
    server.plan = [{"headers": {"Content-Encoding": "gzip"}}]
    with pytest.raises(FinalError, match="came compressed .gzip. though nobody asked for it; check your proxy"):
        get(server, tmp_path / "file")


def test_wrong_contents(server, tmp_path):
    server.files["file"] = OTHER
    with pytest.raises(FinalError, match=r"SHA-256 is \w{12}.*not \w{12}.*damaged on the way or changed"):
        get(server, tmp_path / "file", wanted=KNOWN)
    assert len(server.requests) == 2 and not (tmp_path / "file").exists()  # once more, then it is no accident
    server.plan = [{"body": OTHER}]
    server.files["file"] = CONTENT
    assert get(server, tmp_path / "file", wanted=KNOWN) == CONTENT


# --- a file that changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("validator", ["etag", "date", "weak etag", "none"])
@pytest.mark.parametrize("honest", [True, False])
def test_a_changed_file_is_not_glued_together(server, tmp_path, validator, known, honest):
    """Changed on the server in the middle of the transfer, the size staying the same."""
    old = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"} if validator == "date" else {}
    new = {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"} if validator == "date" else {}
    server.send_etag = "etag" in validator
    if validator == "weak etag":
        server.etags["file"] = 'W/"same"'
    server.files["file"] = OTHER
    server.plan = [{"cut": 1_000_000, "change": CONTENT, "headers": old}] + [{"headers": new}] * 4
    if not honest:  # a server that does not know If-Range sends the part all the same
        real = server._answer
        server._answer = lambda handler: (handler.headers.__delitem__("If-Range"), real(handler))
    assert get(server, tmp_path / "file", wanted=KNOWN if known else Wanted()) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_part_from_another_run(server, tmp_path):
    path = tmp_path / "file"
    begin(server, path)
    assert get(server, path) == CONTENT and server.ranges() == ["bytes=1000000-"]
    assert server.requests[0][1]["If-Range"].startswith('"')
    path.unlink()
    begin(server, path)
    server.files["file"] = OTHER[:2_000_000]
    assert get(server, path) == OTHER[:2_000_000]
    path.unlink()
    server.files["file"] = CONTENT
    begin(server, path)
    (tmp_path / "file.part.json").unlink()  # nothing is known about these bytes
    assert get(server, path) == CONTENT and server.ranges() == [None]
    path.unlink()
    begin(server, path)
    (tmp_path / "file.part.json").write_text("{")
    assert get(server, path) == CONTENT and server.ranges() == [None]


def test_a_part_from_another_mirror_counts_only_with_a_checksum(server, tmp_path):
    for wanted, expected in ((Wanted(), [None]), (KNOWN, ["bytes=1000000-"])):
        path = tmp_path / f"file{bool(wanted.sha256)}"
        begin(server, path, place="/mirror/file", wanted=wanted)
        assert get(server, path, wanted=wanted) == CONTENT and server.ranges() == expected


def test_stopped_between_the_last_byte_and_the_new_name(server, tmp_path):
    def interrupt(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "file", wanted=Wanted(check=interrupt))
    server.requests.clear()
    assert (tmp_path / "file.part").stat().st_size == len(CONTENT) and not (tmp_path / "file").exists()
    assert get(server, tmp_path / "file") == CONTENT and not server.requests


# --- errors by status -------------------------------------------------------------------------------------------------


def test_passing_errors_are_tried_again_and_final_ones_are_not(server, tmp_path):
    server.plan = [{"status": status} for status in (503, 429, 500, 408)]
    assert get(server, tmp_path / "file") == CONTENT and len(server.requests) == 5
    for status, message in ((404, "HTTP 404"), (410, "410"), (401, "HF_TOKEN"), (403, "HF_TOKEN"), (400, "HTTP 400")):
        server.plan, server.requests = [{"status": status}], []
        with pytest.raises(FinalError, match=message):
            get(server, tmp_path / "other")
        assert len(server.requests) == 1
    server.plan = [{"status": 403, "headers": {"X-Error-Message": "the terms have not been accepted"}}]
    with pytest.raises(FinalError, match="terms have not been accepted"):
        get(server, tmp_path / "other")
    server.plan = [{"status": 503}] * 9
    with pytest.raises(FetchError, match="5 attempts.*503"):
        get(server, tmp_path / "other")


def test_the_wait_doubles_with_jitter_and_follows_the_server(server, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(web.time, "sleep", waits.append)
    for _ in range(10):
        server.plan = [{"status": 503}] * 5
        with pytest.raises(FetchError):
            fetch_file(server.url + "/file", tmp_path / "file")
    for i, exact in enumerate((1, 2, 4, 8)):
        chosen = waits[i::4]
        assert all(0.75 * exact <= pause <= 1.25 * exact for pause in chosen) and len(set(chosen)) == 10
    waits.clear()
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    server.plan = [{"status": 429, "headers": {"Retry-After": value}} for value in ("120", later, "1", "nonsense")]
    fetch_file(server.url + "/file", tmp_path / "file")
    assert 120 <= waits[0] <= 150 and 98 <= waits[1] <= 125 and 3 <= waits[2] <= 5 and 6 <= waits[3] <= 10
    server.plan = [{"status": 429, "headers": {"Retry-After": "3600"}}]
    with pytest.raises(FinalError, match="429.*asks to wait 3600 s; run again then"):
        fetch_file(server.url + "/file", tmp_path / "other")


def test_stopping_does_not_wait(server, tmp_path):
    server.plan = [{"status": 429, "headers": {"Retry-After": "300"}}]
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        fetch_file(server.url + "/file", tmp_path / "file", stop=stop)
    assert time.monotonic() - began < 5


# --- disk -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_and_keeps_the_part_after(server, tmp_path, monkeypatch):
    usage = fetch.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda path: usage._replace(free=5 * 2**20))
        with pytest.raises(FinalError, match=r"no space for .*file: 3 MiB are missing, 5 MiB are free.*0 MiB are kept"):
            get(server, tmp_path / "file")

    class Filling(io.FileIO):
        """A file on a disk with room for two million bytes."""

        def write(self, data, /):
            room = 2_000_000 - os.fstat(self.fileno()).st_size
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(bytes(data[:room]))

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "open", lambda path, mode: io.BufferedWriter(Filling(path, mode)), raising=False)
        server.requests.clear()
        with pytest.raises(
            FinalError, match=r"no space for .*file: 1 MiB are missing.*2 MiB are kept.*run again to go on"
        ):
            get(server, tmp_path / "file")
        assert len(server.requests) == 1 and (tmp_path / "file.part").stat().st_size == 2_000_000
    server.requests.clear()
    assert get(server, tmp_path / "file") == CONTENT and server.ranges() == ["bytes=2000000-"]


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "folder.part").mkdir()
    with pytest.raises(OSError, match="folder.part"):
        get(server, tmp_path / "folder")
    assert not server.requests


# --- several at once --------------------------------------------------------------------------------------------------

CHILD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from nanochat_jax.data.fetch import fetch_file
    print("ready", flush=True)
    sys.stdin.readline()
    fetch_file(sys.argv[1], Path(sys.argv[2]), wait=0)
    print("done", flush=True)
""")


def child(server, path):
    command = [sys.executable, "-c", CHILD, server.url + "/file", str(path)]
    root = Path(__file__).parents[2]
    process = children.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True)
    return process


def test_processes_fetch_a_file_once(server, tmp_path):
    server.delay = 0.2
    children = [child(server, tmp_path / "file") for _ in range(3)]
    for process in children:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n")[0] for process in children]
    assert outputs == ["done\n"] * 3 and len(server.requests) == 1
    assert (tmp_path / "file").read_bytes() == CONTENT and len(list(tmp_path.iterdir())) == 1


def test_killed_while_fetching(server, tmp_path):
    for size in (400_000, 1_000_000, 2_500_000):
        server.plan = [{"stall": size}]
        process = child(server, tmp_path / "file")
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        part = tmp_path / "file.part"
        deadline = time.monotonic() + 20
        while not (part.is_file() and part.stat().st_size >= size // 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    assert get(server, tmp_path / "file") == CONTENT
    assert server.ranges()[0] is None and all(server.ranges()[1:])


def test_threads_fetch_a_file_once(server, tmp_path):
    server.delay = 0.1
    threads = [threading.Thread(target=get, args=(server, tmp_path / "file")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.requests) == 1


# --- JSON, proxies, offline -------------------------------------------------------------------------------------------


def test_json(server):
    server.publish_json("/list", [1, 2])
    server.plan = [{"status": 503}, {"cut": 2}, {"headers": {"Link": '</list?page=2>; rel="next", <x>; rel="last"'}}]
    assert fetch_json(server.url + "/list", "secret", wait=0) == ([1, 2], "/list?page=2")
    assert [headers["Authorization"] for _, headers in server.requests] == ["Bearer secret"] * 3
    assert fetch_json(server.url + "/list", wait=0) == ([1, 2], None)
    server.plan = [{"body": b"<html>log in</html>"}]
    with pytest.raises(FinalError, match="sent no JSON .a web page.; check HF_ENDPOINT and your proxy"):
        fetch_json(server.url + "/list", wait=0)


def test_proxies_are_honoured(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    fetch_file("http://somewhere.invalid/file", tmp_path / "file", wait=0)
    assert server.requests[0][0] == "http://somewhere.invalid/file"


def test_offline(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)  # whoever makes one fails otherwise than by OfflineError
    for call in (
        lambda: fetch_file(server.url + "/file", tmp_path / "file"),
        lambda: fetch_json(server.url + "/file"),
        lambda: web.fetch_bytes(server.url + "/file"),
    ):
        with pytest.raises(OfflineError, match="NANOCHAT_OFFLINE"):
            call()
    assert not server.requests and not list(tmp_path.iterdir())
