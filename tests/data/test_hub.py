"""Downloads, against a hub on this machine that speaks as much of its language as `huggingface_hub` asks for."""

import hashlib
import json
import random
import re
import signal
import socket
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from nanochat_jax.data import hub
from nanochat_jax.data.fetch import (
    STAGING,
    FetchError,
    OfflineError,
    endpoint,
    fetch,
    fetch_text,
    fetch_url,
    git_blob_hash,
    hub_base,
    list_files,
    offline,
)
from nanochat_jax.data.hub import DATASETS, DEFAULT_REPO, download_shards, fetch_ahead, find_list, main, shards_dir
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.shards import LAST_SHARD, Shard, ShardList, shard_name, shards_for
from nanochat_jax.data.sources import text_source
from tests import children
from tests.web_server import HubServer, no_real_network

# Parquet only in name: downloads look at names, sizes and checksums alone.
SHARDS = {shard_name(i): random.Random(i).randbytes(50_000 + i) for i in (0, 1, 2, 3, LAST_SHARD)}
BASE = hub_base(DEFAULT_REPO)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wanted(name: str) -> Shard:
    return Shard(name, len(SHARDS[name]), sha256(SHARDS[name]))


@pytest.fixture
def server():
    server = HubServer()
    server.publish(DEFAULT_REPO, SHARDS)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(server, tmp_path, monkeypatch):
    no_real_network(monkeypatch)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.parquet")}


# --- one file ---------------------------------------------------------------------------------------------------------


def test_a_file_lands_complete_and_compared(server, tmp_path):
    name = shard_name(1)
    assert fetch(BASE, wanted(name), tmp_path / "x.parquet").read_bytes() == SHARDS[name]
    assert list((tmp_path / STAGING).glob("*.parquet")) == []  # nothing is left beside it but a lock
    fetch(BASE, wanted(name), tmp_path / "x.parquet")
    assert server.downloads() == [name], "it was downloaded again"


def test_a_transfer_that_breaks_off_or_stalls_resumes_there(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what the library writes at once
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    server.plan = [{"cut": 10_000}, {"stall": 20_000}]
    fetch(BASE, wanted(shard_name(0)), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == SHARDS[shard_name(0)]
    assert server.ranges() == [None, "bytes=10000-", "bytes=30000-"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_in_trouble_is_asked_again(server, tmp_path, status):
    server.plan = [{"status": status}] * 2
    server.plan_heads = [status] * 2
    fetch(BASE, wanted(shard_name(0)), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == SHARDS[shard_name(0)]
    server.plan = [{"status": status}] * 100
    with pytest.raises(FetchError, match=f"{shard_name(1)}.*{status}"):
        fetch(BASE, wanted(shard_name(1)), tmp_path / "y")
    assert 3 < len(server.downloads()) < 40  # it ends, and leaves nothing
    assert not (tmp_path / "y").exists() and not (tmp_path / STAGING / "y").exists()


def test_what_can_not_be_had_is_one_line_that_names_it(server, tmp_path, monkeypatch):
    for status in (401, 403):
        server.plan_heads, server.heads = [status] * 9, []
        with pytest.raises(FetchError, match=f"{shard_name(0)}.*{status}.*HF_TOKEN") as caught:
            fetch(BASE, wanted(shard_name(0)), tmp_path / "x")
        assert "\n" not in str(caught.value) and len(server.heads) <= 2
    server.plan_heads = []
    with pytest.raises(FetchError, match="none.parquet.*404"):
        fetch(BASE, Shard("none.parquet"), tmp_path / "x")
    with pytest.raises(FetchError, match="other/repo.*404"):
        list_files("other/repo")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(FetchError, match="HF_ENDPOINT") as caught:
            fetch(BASE, wanted(shard_name(0)), tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["content", "size"])
def test_what_is_not_as_listed_is_removed(server, tmp_path, change):
    name = shard_name(0)
    content = SHARDS[name][:-1] + b"?"
    server.files[f"/datasets/{DEFAULT_REPO}/resolve/main/{name}"] = content if change == "content" else content + b"?"
    with pytest.raises(FetchError, match=name):
        fetch(BASE, wanted(name), tmp_path / name)
    assert not (tmp_path / name).exists() and not list((tmp_path / STAGING).glob("*.parquet"))


def test_a_file_outside_lfs_is_compared_by_its_blob_hash(server, tmp_path):
    server.publish("some/small", {"a.parquet": b"small", "b.parquet": b"other"}, lfs=False)
    first = list_files("some/small")[0]
    assert first.sha256 is None
    path = fetch(hub_base("some/small"), first, tmp_path / "a")
    # what `git hash-object` says of the five bytes
    assert git_blob_hash(path) == first.git_sha1 == hashlib.sha1(b"blob 5\0small").hexdigest()
    server.files["/datasets/some/small/resolve/main/b.parquet"] = b"OTHER"
    with pytest.raises(FetchError, match="b.parquet"):
        fetch(hub_base("some/small"), list_files("some/small")[1], tmp_path / "b")


def test_a_full_disk_names_the_file(server, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(OSError, match=str(tmp_path / "x")):
        fetch(BASE, wanted(shard_name(0)), tmp_path / "x")


def test_the_token_is_sent_to_the_hub_only(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other = HubServer()
    try:
        other.files["/elsewhere/x.bin"] = b"12345"
        fetch(BASE, wanted(shard_name(0)), tmp_path / "x")
        fetch_url(other.url + "/elsewhere/x.bin", tmp_path / "y")
        sent = [headers.get("authorization") or headers.get("Authorization") for _, headers in server.requests]
        assert sent == ["Bearer hf_secret"]
        assert not any("uthorization" in key for _, headers in other.requests for key in headers)
    finally:
        other.close()


def test_a_plain_address(server, tmp_path):
    url, name = server.url + "/plain/words.txt", tmp_path / "words.txt"
    server.files["/plain/words.txt"] = b"cat\ndog\n"
    server.plan = [{"status": 503}, {"cut": 3}, {"reset": 2}]
    assert fetch_url(url, name).read_bytes() == b"cat\ndog\n" and fetch_text(url) == "cat\ndog\n"
    fetch_url(url, name)
    assert len(server.paths()) == 5
    with pytest.raises(FetchError, match="words.txt"):
        fetch_url(url, tmp_path / "other", Shard("words.txt", None, "0" * 64))
    assert not (tmp_path / "other").exists()
    with pytest.raises(FetchError, match="nothing.*404"):
        fetch_url(server.url + "/nothing", tmp_path / "other")


def test_several_at_once_download_once(server, tmp_path):
    server.delay = 0.05
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch(BASE, wanted(shard_name(0)), tmp_path / "x").read_bytes(), range(4)))
    assert found == [SHARDS[shard_name(0)]] * 4 and len(server.downloads()) == 1


CHILD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from nanochat_jax.data.fetch import fetch, hub_base
    from nanochat_jax.data.shards import Shard
    fetch(hub_base(sys.argv[1]), Shard(sys.argv[2], int(sys.argv[3]), sys.argv[4]), Path(sys.argv[5]))
""")


def test_a_killed_process_leaves_nothing_that_looks_complete(server, tmp_path):
    shard = wanted(shard_name(0))
    path = tmp_path / shard.name
    command = [sys.executable, "-c", CHILD, DEFAULT_REPO, shard.name, str(shard.size), str(shard.sha256), str(path)]
    server.plan = [{"stall": 30_000}]
    process = children.start(command, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not server.downloads() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    assert fetch(BASE, shard, path).read_bytes() == SHARDS[shard.name]
    left = [item for item in (tmp_path / STAGING).rglob("*") if item.is_file() and item.suffix != ".lock"]
    assert left == []  # what the killed process left has been cleared away


# --- lists ------------------------------------------------------------------------------------------------------------


def test_the_hubs_list_is_kept(server):
    listing = find_list(shards_dir())
    assert [shard.name for shard in listing.shards] == sorted(SHARDS) and listing.val == shard_name(LAST_SHARD)
    assert list(listing.shards) == [wanted(name) for name in sorted(SHARDS)]
    asked = len(server.requests)
    assert find_list(shards_dir()) == listing == ShardList.load(shards_dir()) and len(server.requests) == asked
    (shards_dir() / "shards.json").write_text("{")
    with pytest.raises(DataError, match="shards.json"):
        find_list(shards_dir())


def test_a_list_made_before(server, tmp_path):
    """`shards.json` as version 1 of this project wrote it: the address is resolved on the hub of today."""
    shards = [{"name": name, "size": len(data), "sha256": sha256(data)} for name, data in SHARDS.items()]
    content = {"format": "nanochat_jax.shards", "version": 1, "base": f"datasets/{DEFAULT_REPO}/resolve/main"}
    (tmp_path / "shards.json").write_text(json.dumps({**content, "val": shard_name(LAST_SHARD), "shards": shards}))
    listing = find_list(tmp_path)
    assert download_shards(listing, listing.shards, tmp_path) == {} and files_in(tmp_path) == SHARDS


def test_the_references_layout(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT")
    assert endpoint() == "https://huggingface.co"
    assert hub_base("a/b", "c d/", "refs/x") == "datasets/a/b/resolve/refs%2Fx/c%20d"
    assert shard_name(7) == "shard_00007.parquet"
    # depth 20: 11.2 G tokens; the reference takes 240 shards for it
    assert shards_for(11.22e9) == 216 and shards_for(1) == 1
    listing = ShardList(BASE, tuple(map(wanted, sorted(SHARDS))), shard_name(LAST_SHARD))
    assert [shard.name for shard in listing.first(2)] == [shard_name(LAST_SHARD), shard_name(0), shard_name(1)]
    assert len(listing.first(-1)) == len(listing.first(5000)) == 5 and len(listing.first(0)) == 1


def test_any_repository_folder_and_revision(server):
    files = {f"{i:03d}_00000.parquet": b"%d" % i * 99 for i in range(3)}
    server.publish("some/thing", {**files, "README.md": b"text"}, "sample/10BT", "refs/convert/parquet")
    options = ["--repo=some/thing", "--folder=sample/10BT", "--revision=refs/convert/parquet", "-n", "-1"]
    assert main(options) == 0
    place = shards_dir().with_name("some--thing--sample--10BT")
    assert files_in(place) == files and ShardList.load(place).val == "002_00000.parquet"  # type: ignore[union-attr]


def test_a_list_on_any_web_server(server, tmp_path):
    listing = ShardList("", tuple(map(wanted, SHARDS)), shard_name(1))
    (tmp_path / "made").mkdir()
    listing.save(tmp_path / "made")
    server.files = {**SHARDS, "/corpus/shards.json": (tmp_path / "made" / "shards.json").read_bytes()}
    assert main([f"--list={server.url}/corpus/shards.json", "-n", "2", f"--out={tmp_path / 'here'}"]) == 0
    assert set(files_in(tmp_path / "here")) == {shard_name(0), shard_name(1), shard_name(2)}
    assert "/corpus/shard_00002.parquet" in server.paths()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["shards"].pop(),  # one file: nothing to hold out
        lambda c: c["shards"][0].update(name="../../x.parquet"),
        lambda c: c["shards"][0].update(name="b.parquet"),
        lambda c: c["shards"][0].update(sha256=None),
        lambda c: c["shards"][0].pop("size"),
        lambda c: c.update(val="c.parquet"),
        lambda c: c.update(version=9),
        lambda c: c.clear(),
    ],
)
def test_lists_that_cannot_be(server, tmp_path, change):
    ShardList("", (Shard("a.parquet", 1, "0" * 64), Shard("b.parquet", 1, "1" * 64)), "b.parquet").save(tmp_path)
    content = json.loads((tmp_path / "shards.json").read_text())
    change(content)
    server.publish_json("/shards.json", content)
    with pytest.raises(FetchError, match="shards.json"):
        find_list(tmp_path / "here", url=server.url + "/shards.json")


@pytest.mark.parametrize("listing", [b'{"error": "gone"}', b"<html>log in</html>", b'[{"type": "file"}]', b"[]"])
def test_answers_that_are_no_list(server, listing):
    server.files[f"/api/datasets/{DEFAULT_REPO}/tree/main"] = listing
    with pytest.raises(FetchError, match=DEFAULT_REPO):
        find_list(shards_dir())


def test_a_list_without_every_sha256_is_not_kept(server, caplog):
    server.publish(DEFAULT_REPO, SHARDS, lfs=False)
    assert main(["-n", "2"]) == 0 and not (shards_dir() / "shards.json").exists()
    assert caplog.text and len(files_in(shards_dir())) == 3


# --- many files -------------------------------------------------------------------------------------------------------


def test_files_are_downloaded_ahead_but_no_more_than_expected(server, tmp_path):
    listing = ShardList(BASE, tuple(map(wanted, sorted(SHARDS))), shard_name(LAST_SHARD))
    server.delay = 0.05
    files = fetch_ahead(listing, tmp_path, listing.shards, ahead=2, expected=2)
    for number, (shard, file) in enumerate(files):
        wait([file])
        assert file.result().read_bytes() == SHARDS[shard.name]
        assert len(server.downloads()) <= max(2, number + 1), "more was begun than is expected to be read"
    server.requests.clear()
    files = fetch_ahead(listing, tmp_path / "2", listing.shards, ahead=2)
    shard, file = next(files)
    file.result()
    deadline = time.monotonic() + 20
    while len(files_in(tmp_path / "2")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert set(files_in(tmp_path / "2")) == set(sorted(SHARDS)[:3]) and server.most_open > 1


def test_an_error_of_the_thread_comes_where_the_file_is_needed(server, tmp_path):
    listing = ShardList(BASE, tuple(map(wanted, sorted(SHARDS))), shard_name(LAST_SHARD))
    del server.files[f"/datasets/{DEFAULT_REPO}/resolve/main/{shard_name(1)}"]
    files = fetch_ahead(listing, tmp_path, listing.shards, ahead=2)
    assert next(files)[1].result().read_bytes() == SHARDS[shard_name(0)]
    with pytest.raises(FetchError, match=f"{shard_name(1)}.*404"):
        next(files)[1].result()


# --- the command ------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_and_the_held_out_one(server, capsys, monkeypatch):
    monkeypatch.setattr("nanochat_jax.utils.progress.LINE_EVERY_S", 0.0)
    assert main(["-n", "2", "-w", "2"]) == 0
    assert files_in(shards_dir()) == {name: SHARDS[name] for name in map(shard_name, (0, 1, LAST_SHARD))}
    asked = len(server.requests)
    assert main(["-n", "2"]) == 0 and len(server.requests) == asked  # nothing is downloaded twice
    out = capsys.readouterr().out
    shares = [int(share) for share in re.findall(r"^shards: +(\d+)%", out, re.M)]
    assert shares == sorted(shares) and shares[-1] == 100 and "3 of 3 shards" in out
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["--tokens=1.5e8", f"--endpoint={server.url}"]) == 0 and shard_name(2) in files_in(shards_dir())
    assert main(["-n", "1", "-w", "0"]) == 2 and "--num_workers" in capsys.readouterr().err


def test_anything_missing_gives_an_error_status_and_the_way_on(server, capsys):
    path = f"/datasets/{DEFAULT_REPO}/resolve/main/"
    del server.files[path + shard_name(2)]
    server.files[path + shard_name(1)] = b"<html>please log in</html>"
    assert main(["-n", "3", "--num_workers=1"]) == 1
    shown = capsys.readouterr()
    assert "2 of 4 shards" in shown.out
    assert "error: shard_00001.parquet: " in shown.err and "error: shard_00002.parquet: " in shown.err
    assert "python -m nanochat_jax.data.hub -n 3" in shown.err
    assert set(files_in(shards_dir())) == {shard_name(0), shard_name(LAST_SHARD)}
    server.publish(DEFAULT_REPO, SHARDS)
    assert main(["-n", "3"]) == 0


def test_damaged_files_are_found_and_downloaded_again(server, capsys):
    assert main(["-n", "2"]) == 0
    path, name = shards_dir() / shard_name(1), shard_name(1)
    path.write_bytes(SHARDS[name][:-20] + b"?" * 20)
    assert main(["-n", "2"]) == 0 and path.read_bytes() != SHARDS[name]  # the same size: seen only by reading
    assert main(["-n", "2", "--verify"]) == 0 and path.read_bytes() == SHARDS[name]
    assert str(path) in capsys.readouterr().out
    path.write_bytes(SHARDS[name][:-20])
    assert main(["-n", "2"]) == 0 and path.read_bytes() == SHARDS[name]  # another size: seen at once


def test_too_small_a_disk_is_told_first(server, capsys, monkeypatch):
    usage = hub.shutil.disk_usage("/")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert main(["-n", "2"]) == 1
    assert "GB" in capsys.readouterr().err and server.downloads() == []


# --- offline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["NANOCHAT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_mode_opens_no_socket(server, tmp_path, monkeypatch, capsys, variable):
    assert main(["-n", "1"]) == 0
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(socket, "socket", None)  # whoever makes one fails otherwise than by OfflineError
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert main(["-n", "1"]) == 0  # all there: nothing to refuse
    assert main(["-n", "2"]) == 1
    assert f"{variable} is set, so shard_00001.parquet" in capsys.readouterr().err
    (shards_dir() / "shards.json").unlink()
    assert main(["-n", "1"]) == 1 and variable in capsys.readouterr().err
    for refused in (
        lambda: fetch(BASE, Shard("x.parquet"), tmp_path / "x.parquet"),
        lambda: fetch_url("http://127.0.0.1:9/x", tmp_path / "x"),
        lambda: fetch_text("http://127.0.0.1:9/x"),
        lambda: list_files("some/thing"),
    ):
        with pytest.raises(OfflineError, match=variable):
            refused()
    monkeypatch.delenv(variable)
    for value, meaning in (("0", False), ("false", False), ("", False), ("yes", True)):
        monkeypatch.setenv("NANOCHAT_OFFLINE", value)
        assert offline() == meaning


def test_the_data_sets_of_the_recipes_have_short_names(server, capsys):
    server.publish(DATASETS["climbmix"], SHARDS)
    assert main(["-n", "1", "--repo=climbmix"]) == 0
    assert set(files_in(shards_dir("climbmix"))) == {shard_name(0), shard_name(LAST_SHARD)}
    assert str(shards_dir("climbmix")) in text_source(recipe="modern").description
    with pytest.raises(DataError, match="--repo=fineweb_edu"):
        text_source(recipe="v1")
