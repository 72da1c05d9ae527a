"""Getting and reading the CORE bundle: folder, zip, fetched; damaged, incomplete, hostile."""

import io
import json
import zipfile

import pytest

from nanochat_jax.evals import core_bundle
from nanochat_jax.evals.core_bundle import BundleError, open_bundle
from nanochat_jax.utils.paths import sha256_file, sha256_hex
from tests.web_server import WebServer

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
    facts = birds.label, birds.kind, birds.num_fewshot, birds.delimiter
    assert facts == ("birds", "multiple_choice", 2, "\nAnswer: ")
    assert birds.baseline == pytest.approx(0.25) and ends.baseline == pytest.approx(0.091) and ends.delimiter == " "
    assert bundle.items(birds) == BIRDS and bundle.items(ends) == ENDS


@pytest.mark.parametrize("prefix", ["", "eval_bundle/"])
def test_folder_and_zip(tmp_path, prefix):
    folder = write_folder(tmp_path / "f", files(prefix))
    check(open_bundle(folder))
    archive = tmp_path / "x.zip"
    archive.write_bytes(zipped(files(prefix)))
    bundle = open_bundle(archive)
    check(bundle)
    assert bundle.sha256 == sha256_file(archive)
    before = open_bundle(folder).sha256
    (folder / f"{prefix}eval_data/nature/ends.jsonl").write_text("{}\n\n\n")
    assert open_bundle(folder).sha256 != before


# --- fetching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server with the bundle, and an empty base directory."""
    server = WebServer()
    server.files["/eval_bundle.zip"] = zipped(files())
    monkeypatch.setattr(core_bundle, "URL", f"{server.url}/eval_bundle.zip")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    yield server, tmp_path / "base"
    server.close()


def test_fetched_once_and_its_hash_kept(server):
    server, base = server
    check(open_bundle())
    check(open_bundle())
    assert len(server.requests) == 1
    sent = server.files["/eval_bundle.zip"]
    assert json.loads((base / "eval_bundle.zip.json").read_text())["sha256"] == sha256_hex(sent)


def test_a_folder_in_the_base_directory_is_used(server):
    server, base = server
    write_folder(base, files())
    check(open_bundle())
    assert not server.requests


@pytest.mark.parametrize("damage", ["no zip", "cut", "flipped"])
def test_what_is_damaged_is_set_aside_and_fetched_again(server, damage):
    server, base = server
    good = server.files["/eval_bundle.zip"]
    bad = {"no zip": b"<html>sign in</html>", "cut": good[:-30], "flipped": good.replace(b"three", b"threw")}[damage]
    assert bad != good
    server.files["/eval_bundle.zip"] = bad
    with pytest.raises(BundleError, match=r"eval_bundle\.zip.*eval_bundle\.zip\.bad"):
        open_bundle()
    assert (base / "eval_bundle.zip.bad").read_bytes() == bad
    server.files["/eval_bundle.zip"] = good
    check(open_bundle())
    assert len(server.requests) == 2


def test_a_file_that_changed_after_it_was_fetched(server):
    server, base = server
    its_hash = sha256_hex(server.files["/eval_bundle.zip"])
    open_bundle()
    (base / "eval_bundle.zip").write_bytes(zipped(files(**{"core.yaml": YAML + "\n"})))
    with pytest.raises(BundleError, match=its_hash):
        open_bundle()
    check(open_bundle())


def test_offline_says_where_to_put_it(server, monkeypatch):
    server, base = server
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(BundleError, match=rf"{base}/eval_bundle.zip .*{base}/eval_bundle"):
        open_bundle()
    assert not server.requests


# --- bad bundles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"core.yaml": None}, "core.yaml"),
        ({"eval_meta_data.csv": None}, "eval_meta_data.csv"),
        ({"core.yaml": "icl_tasks: [{label: x}]"}, "core.yaml.*KeyError"),
        ({"core.yaml": "icl_tasks: !!python/object/apply:os.getcwd []"}, "core.yaml"),
        ({"core.yaml": YAML.replace("nature/ends", "../../ends")}, "outside.* ../../ends"),
        ({"core.yaml": YAML.replace("nature/ends", "/etc/ends")}, "outside.* /etc/ends"),
        ({"core.yaml": YAML.replace("language_modeling", "riddle")}, "ends .*'riddle'"),
        ({"eval_meta_data.csv": CSV.replace("ends", "end")}, "baseline .*ends"),
        ({"eval_meta_data.csv": CSV.replace("9.1", "low")}, "eval_meta_data.csv.*baselines"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, changes, message):
    folder, archive = write_folder(tmp_path / "b", files("", **changes)), tmp_path / "b.zip"
    archive.write_bytes(zipped(files("", **changes)))
    for path in (folder, archive):
        with pytest.raises(BundleError, match=message):
            open_bundle(path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", ""),
        ("[1]", "JSON object"),
        ('{"query": "a", "gold": 0}', "'choices'"),
        ('{"query": "a", "choices": [], "gold": 0}', "choices"),
        ('{"query": "a", "choices": ["x", 3], "gold": 0}', "choices"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 2}', "gold is 2"),
        ('{"query": null, "choices": ["x", "y"], "gold": 1}', "query"),
    ],
)
def test_bad_items_are_named_by_file_and_line(tmp_path, line, message):
    text = json.dumps(BIRDS[0]) + "\n" + line + "\n"
    bundle = open_bundle(write_folder(tmp_path, files("", **{"eval_data/nature/birds.jsonl": text})))
    with pytest.raises(BundleError, match=f"birds.jsonl, line 2.*{message}"):
        bundle.items(bundle.tasks[0])


def test_missing_and_empty_item_files(tmp_path):
    changes = {"eval_data/nature/birds.jsonl": "\n", "eval_data/nature/ends.jsonl": None}
    bundle = open_bundle(write_folder(tmp_path, files("", **changes)))
    with pytest.raises(BundleError, match="birds.jsonl has no items"):
        bundle.items(bundle.tasks[0])
    with pytest.raises(BundleError, match="ends.jsonl of the CORE bundle cannot be read"):
        bundle.items(bundle.tasks[1])
    with pytest.raises(BundleError, match="not there"):
        open_bundle(tmp_path / "nowhere")
