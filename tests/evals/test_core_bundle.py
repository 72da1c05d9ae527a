"""Getting and reading the CORE bundle: folder, zip, fetched; damaged, incomplete, hostile."""

import http.server
import io
import json
import threading
import zipfile

import pytest

from nanochat_jax.evals import core_bundle
from nanochat_jax.evals.core_bundle import BundleError, open_bundle
from nanochat_jax.utils.paths import sha256_file, sha256_hex

YAML = """
icl_tasks:
-
  label: birds
  dataset_uri: nature/birds.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: " # a comment
-
  label: ends
  dataset_uri: nature/ends.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
"""
CSV = 'Eval Task,Task Category,Random baseline,Description\nbirds,x,25,"a, b"\nother,x,3,\nends,y,9.1,\n'
BIRDS = [{"query": "Which\u2028flies?", "choices": ["gull", "boat"], "gold": 0}] * 3
ENDS = [{"context": "one two", "continuation": "three"}]


def files(prefix: str = "eval_bundle/", **changes) -> dict[str, str]:
    content = {
        "core.yaml": YAML,
        "eval_meta_data.csv": CSV,
        "eval_data/nature/birds.jsonl": "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in BIRDS) + "\n",
        "eval_data/nature/ends.jsonl": "".join(json.dumps(e) + "\n" for e in ENDS),
        **changes,
    }
    return {prefix + name: text for name, text in content.items() if text is not None}


def zipped(content: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def write_folder(root, content):
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def check(bundle):
    birds, ends = bundle.tasks
    assert (birds.label, birds.kind, birds.num_fewshot, birds.delimiter) == (
        "birds",
        "multiple_choice",
        2,
        "\nAnswer: ",
    )
    assert birds.baseline == pytest.approx(0.25) and ends.baseline == pytest.approx(0.091) and ends.delimiter == " "
    assert bundle.items(birds) == BIRDS and bundle.items(ends) == ENDS


@pytest.mark.parametrize("prefix", ["", "eval_bundle/"])
def test_folder_and_zip(tmp_path, prefix):
    folder = write_folder(tmp_path / "f", files(prefix))
    check(open_bundle(folder))
    archive = tmp_path / "x.zip"
    archive.write_bytes(zipped(files(prefix)))
    bundle = open_bundle(archive, expected_sha256=sha256_file(archive))
    check(bundle)
    assert bundle.sha256 == sha256_file(archive)
    with pytest.raises(BundleError, match="expected 00"):
        open_bundle(archive, expected_sha256="00")
    assert archive.is_file(), "a file the user named stays where it is"
    before = open_bundle(folder).sha256
    (folder / f"{prefix}eval_data/nature/ends.jsonl").write_text("{}\n\n\n")
    assert open_bundle(folder).sha256 != before


# --- fetching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A list whose last entry is what the server sends; counts requests in `hits`. The base directory is empty."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(sent[-1])))
            self.end_headers()
            self.wfile.write(sent[-1])

        def log_message(self, *args):
            pass

    sent, hits = [zipped(files())], []
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    monkeypatch.setattr(core_bundle, "URL", f"http://127.0.0.1:{http_server.server_port}/eval_bundle.zip")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    yield sent, hits, tmp_path / "base"
    http_server.shutdown()
    http_server.server_close()


def test_fetched_once_and_its_hash_kept(server):
    sent, hits, base = server
    check(open_bundle())
    check(open_bundle())
    assert len(hits) == 1
    assert json.loads((base / "eval_bundle.zip.json").read_text())["sha256"] == sha256_hex(sent[0])


def test_a_folder_in_the_base_directory_is_used(server):
    _, hits, base = server
    write_folder(base, files())
    check(open_bundle())
    assert not hits


@pytest.mark.parametrize("damage", ["no zip", "cut", "flipped"])
def test_what_is_damaged_is_set_aside_and_fetched_again(server, damage):
    sent, hits, base = server
    good = sent[0]
    spoilt = good.replace(b"three", b"threw")
    assert spoilt != good
    sent.append({"no zip": b"<html>sign in</html>", "cut": good[:-30], "flipped": spoilt}[damage])
    with pytest.raises(BundleError, match=r"eval_bundle\.zip is damaged.*eval_bundle\.zip\.bad; run again"):
        open_bundle()
    assert (base / "eval_bundle.zip.bad").read_bytes() == sent[-1]
    sent.append(good)
    check(open_bundle())
    assert len(hits) == 2


def test_an_unexpected_hash_is_set_aside(server):
    sent, _, base = server
    with pytest.raises(BundleError, match=rf"its SHA-256 is {sha256_hex(sent[0])}, the SHA-256 asked for is 00"):
        open_bundle(expected_sha256="00")
    assert (base / "eval_bundle.zip.bad").is_file() and not (base / "eval_bundle.zip").exists()
    check(open_bundle(expected_sha256=sha256_hex(sent[0])))


def test_a_file_that_changed_after_it_was_fetched(server):
    sent, _, base = server
    open_bundle()
    (base / "eval_bundle.zip").write_bytes(zipped(files(**{"core.yaml": YAML + "\n"})))
    with pytest.raises(BundleError, match="when it was fetched it was"):
        open_bundle()
    check(open_bundle())


def test_offline_says_where_to_put_it(server, monkeypatch):
    _, hits, base = server
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(BundleError, match=rf"{base}/eval_bundle.zip and cannot be downloaded .*unpacked folder at"):
        open_bundle()
    assert not hits


# --- bad bundles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"core.yaml": None}, "has no core.yaml"),
        ({"eval_meta_data.csv": None}, "eval_meta_data.csv of the CORE bundle cannot be read"),
        ({"core.yaml": "icl_tasks: [{label: x}]"}, "core.yaml: cannot read the tasks: KeyError"),
        ({"core.yaml": "icl_tasks: !!python/object/apply:os.getcwd []"}, "core.yaml: cannot read the tasks"),
        ({"core.yaml": YAML.replace("nature/ends", "../../ends")}, "names a file outside the bundle: ../../ends"),
        ({"core.yaml": YAML.replace("nature/ends", "/etc/ends")}, "names a file outside the bundle: /etc/ends"),
        ({"core.yaml": YAML.replace("language_modeling", "riddle")}, "ends is of kind 'riddle'"),
        ({"eval_meta_data.csv": CSV.replace("ends", "end")}, "no random baseline for ends"),
        ({"eval_meta_data.csv": CSV.replace("9.1", "low")}, "cannot read the baselines"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_tables_that_cannot_be_read(tmp_path, changes, message, form):
    path = tmp_path / "b"
    if form == "folder":
        path.mkdir()
        write_folder(path, files("", **changes))
    else:
        path.write_bytes(zipped(files("", **changes)))
    with pytest.raises(BundleError, match=message.replace("(", r"\(")):
        open_bundle(path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: no multiple_choice item"),
        ("[1]", "line 2: no multiple_choice item (not a JSON object)"),
        ('{"query": "a", "gold": 0}', "field 'choices' is missing"),
        ('{"query": "a", "choices": [], "gold": 0}', "choices must be a list of texts"),
        ('{"query": "a", "choices": ["x", 3], "gold": 0}', "choices must be a list of texts"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 2}', "gold is 2, there are 2 choices"),
        ('{"query": null, "choices": ["x", "y"], "gold": 1}', "query must be a text"),
    ],
)
def test_bad_items_are_named_by_file_and_line(tmp_path, line, message):
    text = json.dumps(BIRDS[0]) + "\n" + line + "\n"
    bundle = open_bundle(write_folder(tmp_path, files("", **{"eval_data/nature/birds.jsonl": text})))
    with pytest.raises(BundleError) as error:
        bundle.items(bundle.tasks[0])
    assert message in str(error.value) and "birds.jsonl" in str(error.value)


def test_missing_and_empty_item_files(tmp_path):
    changes = {"eval_data/nature/birds.jsonl": "\n", "eval_data/nature/ends.jsonl": None}
    bundle = open_bundle(write_folder(tmp_path, files("", **changes)))
    with pytest.raises(BundleError, match="birds.jsonl has no items"):
        bundle.items(bundle.tasks[0])
    with pytest.raises(BundleError, match="ends.jsonl of the CORE bundle cannot be read"):
        bundle.items(bundle.tasks[1])
    with pytest.raises(BundleError, match="not there"):
        open_bundle(tmp_path / "nowhere")
