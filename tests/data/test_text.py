import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data.documents import (
    CallableDocuments,
    FileDocuments,
    find_files,
    is_held_out,
    pin_path,
    text_iterator,
)
from nanochat_jax.data.readers import (
    PIECE_CHARS,
    PIECE_CHARS_MAX,
    WHOLE_FILE_BYTES,
    DataError,
    Document,
    read_documents,
)
from tests.tokenizer_fixtures import golden


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


def parquet(path, groups, column="text"):
    """A parquet file with the given row groups."""
    schema = pa.schema([(column, pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(pa.table({column: group}, schema=schema))
    return path


def texts(path, **options):
    return [item.text for item in read_documents(path, **options) if isinstance(item, Document)]


def documents(count, start=0):
    return [f"document number {i}: " + "words " * (i % 7) for i in range(start, start + count)]


# --- golden ---------------------------------------------------------------------------------------------


def test_text_iterator_equals_the_reference():
    case = golden("tokenizer_v1")
    for call in case["main"]["text_iterator"]:
        cuts = (text_iterator(texts, call["doc_cap"], call["max_chars"]) for texts in case["corpora"].values())
        assert call["yielded"] in map(list, cuts)  # of one of the corpora
    with pytest.raises(ValueError, match="doc_cap"):
        list(text_iterator(["a"], 0, 10))


# --- formats --------------------------------------------------------------------------------------------


def test_parquet_resumes_anywhere(folder):
    path = parquet(folder / "a.parquet", [documents(3), documents(4, 3), [None, ""], documents(1, 9)])
    whole = texts(path)
    assert whole == [*documents(7), "", "", *documents(1, 9)]
    for start in range(len(whole) + 1):
        assert texts(path, start=start) == whole[start:]


UNUSABLE = {
    "binary.txt": b"PK\x03\x04\x00\x00" + bytes(100),
    "wide.txt": "words".encode("utf-16"),
    "empty.txt": b"",
    "blank.txt": b" \n\n\t\n",
    "image.png": b"x",
    "keys.jsonl": b'{"body": "x"}\n{"body": "y"}\n',
    "noise.parquet": b"noise" * 1000,
}


def test_what_cannot_be_read_is_named(folder):
    good = parquet(folder / "a.parquet", [documents(200)]).read_bytes()
    torn = {"cut.parquet": good[: len(good) // 2], "inside.parquet": good[:50] + bytes(100) + good[150:]}
    for name, data in {**UNUSABLE, **torn}.items():
        (folder / name).write_bytes(data)
    parquet(folder / "column.parquet", [["x"]], column="content")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "none.parquet")
    for name in [*UNUSABLE, *torn, "column.parquet", "numbers.parquet", "none.parquet"]:
        with pytest.raises(DataError, match=name):
            texts(folder / name)
    assert texts(folder / "column.parquet", column="content") == ["x"]
    assert texts(folder / "keys.jsonl", column="body") == ["x", "y"]


WORDS = ["one", None, "two", "one", "", "naïve"]
KINDS = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
    pa.dictionary(pa.int32(), pa.binary()), pa.json_(), pa.json_(pa.large_string()), pa.null(),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_text_in_every_form_that_parquet_has(folder, kind):
    plain = pa.array(WORDS, pa.string())
    if isinstance(kind, pa.DictionaryType):
        values = plain.cast(kind.value_type).dictionary_encode().cast(kind)
    elif isinstance(kind, pa.BaseExtensionType):
        values = kind.wrap_array(plain.cast(kind.storage_type))
    else:
        values = pa.nulls(len(WORDS)) if kind == pa.null() else plain.cast(kind)
    pq.write_table(pa.table({"text": values, "id": list(range(6))}), folder / "a.parquet", row_group_size=4)
    assert texts(folder / "a.parquet") == ([""] * 6 if kind == pa.null() else [word or "" for word in WORDS])
    assert texts(folder / "a.parquet", start=5) == ["" if kind == pa.null() else "naïve"]


@pytest.mark.parametrize(
    "values", [[1, 2], [1.5], [True], [["a"]], [{"a": "b"}], pa.array([1, 2]).dictionary_encode()], ids=str
)
def test_what_is_no_text(folder, values):
    pq.write_table(pa.table({"text": values}), folder / "a.parquet")
    with pytest.raises(DataError, match="a.parquet"):
        texts(folder / "a.parquet")


def test_folders_behind_links_are_read_once(tmp_path, folder, caplog):
    elsewhere = tmp_path / "elsewhere"
    for place in (folder / "in", elsewhere / "deep", elsewhere / ".hidden"):
        place.mkdir(parents=True)
    for name in ("data/a.txt", "data/in/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt", "elsewhere/.hidden/e.txt"):
        (tmp_path / name).write_text(name)
    assert [*find_files([folder])] == ["a.txt", "in/b.txt"]
    links = {
        "far": elsewhere, "also": elsewhere, "self": folder, "aa": folder / "in", "in/up": tmp_path / "data" / "in",
        ".secret": elsewhere, "dead": tmp_path / "nowhere", "dead.txt": tmp_path / "nowhere.txt",
        "one.txt": elsewhere / "c.txt",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(tmp_path)  # a loop through the parent, which also holds both folders
    names = [*find_files([folder])]
    assert names == ["a.txt", "also/c.txt", "also/deep/d.txt", "in/b.txt", "one.txt"]
    assert "dead.txt" in caplog.text
    whole = tmp_path / "whole"
    whole.symlink_to(folder)
    assert [*find_files([whole])] == names and len(FileDocuments(whole, "all").files) == 5


def test_invalid_utf8_in_parquet_is_replaced_and_counted(folder):
    values = pa.array([b"good", b"b\xffd", b"\xc3"], pa.binary())
    pq.write_table(pa.table({"text": values}), folder / "binary.parquet")
    broken = pa.Array.from_buffers(pa.string(), 3, values.buffers())  # a string column that is not UTF-8
    pq.write_table(pa.table({"text": broken}), folder / "string.parquet")
    for name in ("binary.parquet", "string.parquet"):
        found = list(read_documents(folder / name))
        assert found == [("good", 0), ("b\ufffdd", 1), ("\ufffd", 1)], name


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"one\n\ntwo\n\n\nthree\n", ["one\n\ntwo\n\n\nthree"]),  # a small file is one document
        (b"\xef\xbb\xbf# Title\r\n\r\ntext\r\n", ["# Title\r\n\r\ntext"]),
        (b"x", ["x"]),
        (b"1\n<|endoftext|>\n\n<|endoftext|>\n2\nstill <|endoftext|> 2\n", ["1", "2\nstill <|endoftext|> 2"]),
        ("caf\ufffd é ".encode() + b"\xff\xfe bad \xe4\xbd\n", ["caf\ufffd é \ufffd\ufffd bad \ufffd"]),
    ],
)
def test_documents_of_a_text_file(folder, data, found):
    (folder / "a.txt").write_bytes(data)
    assert texts(folder / "a.txt") == found
    invalid = sum(item.invalid_utf8 for item in read_documents(folder / "a.txt") if isinstance(item, Document))
    assert invalid == (3 if b"\xff" in data else 0)


@pytest.mark.parametrize("blank", ["\n", "\r\n", ""])
def test_large_text_files_are_cut_at_blank_lines_or_lines(folder, blank):
    paragraph = ("A line of some words. " * 10 + "\n") * 3 + blank
    (folder / "a.txt").write_text(paragraph * 400, newline="")
    assert (folder / "a.txt").stat().st_size > WHOLE_FILE_BYTES
    found = texts(folder / "a.txt")
    assert len(found) > 10
    top = PIECE_CHARS + len(paragraph) if blank else PIECE_CHARS_MAX + 300
    assert all(PIECE_CHARS <= len(text) <= top for text in found[:-1])
    joined = "".join(found).replace("\n", "").replace("\r", "")
    assert joined == (paragraph * 400).replace("\n", "").replace("\r", "")  # nothing lost, nothing twice
    for start in (1, 5, len(found)):
        assert texts(folder / "a.txt", start=start) == found[start:]


def test_ten_megabyte_document(folder):
    text = "The river runs past the mill. " * 350_000
    (folder / "long.txt").write_text(text)
    (folder / "long.jsonl").write_text(json.dumps({"text": text}))
    parquet(folder / "long.parquet", [[text]])
    assert len(text) > 10_000_000
    for name in ("long.txt", "long.jsonl", "long.parquet"):
        assert texts(folder / name) == [text]


def test_jsonl_bad_lines_are_counted_by_number(folder, caplog):
    lines = ['{"text": "one"}', "{broken", "", '{"other": 1}', '{"text": 5}', "[1]", '{"text": "two \\ud800"}', "nul"]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "val.jsonl").write_text('{"text": "held out"}\n')
    train = FileDocuments(folder)
    assert list(train.iterate()) == ["one", "two \ufffd"]
    assert train.stats.bad_lines == 5 and train.stats.invalid_utf8 == 1
    assert [message.split(":")[1] for message in train.stats.messages] == ["2", "4", "5", "6", "8"]
    assert "a.jsonl:2" in caplog.text and "'text'" in train.stats.messages[1]
    assert list(train.iterate(1)) == ["two \ufffd"]
    assert train.stats.bad_lines == 5  # those after the first document
    assert list(train.iterate(2)) == [] and train.stats.bad_lines == 1


# --- which text is held out -----------------------------------------------------------------------------


def test_files_named_val_are_held_out(folder):
    parquet(folder / "shard_00000.parquet", [["a"]])
    parquet(folder / "shard_00001.parquet", [["b"]])
    parquet(folder / "val_00010.parquet", [["v"]])
    (folder / "more").mkdir()
    (folder / "more" / "validation.txt").write_text("w")
    (folder / ".hidden.txt").write_text("never")
    assert list(FileDocuments(folder, "train").iterate()) == ["a", "b"]
    assert list(FileDocuments(folder, "val").iterate()) == ["w", "v"]
    assert list(FileDocuments(folder, "all").iterate()) == ["w", "a", "b", "v"]
    assert FileDocuments(folder).held_out() == "more/validation.txt, val_00010.parquet"
    assert FileDocuments(folder, "all").held_out() == "nothing"


def test_the_last_shard_is_pinned(folder):
    for i in range(3):
        parquet(folder / f"shard_{i:05d}.parquet", [[f"text {i}"]])
    assert list(FileDocuments(folder, "val").iterate()) == ["text 2"]
    for i in (3, 1822):  # downloaded later: the held-out shard stays what it was
        parquet(folder / f"shard_{i:05d}.parquet", [[f"text {i}"]])
    assert list(FileDocuments(folder, "val").iterate()) == ["text 2"]
    assert list(FileDocuments(folder, "train").iterate()) == ["text 0", "text 1", "text 3", "text 1822"]
    (folder / "shard_00002.parquet").unlink()
    with pytest.raises(DataError, match="shard_00002.parquet"):
        FileDocuments(folder, "train")
    pin_path([folder]).unlink()
    assert list(FileDocuments(folder, "val").iterate()) == ["text 1822"]


def test_hash_split_is_disjoint_stable_and_about_one_percent(folder):
    corpus = documents(5000)
    parquet(folder / "mine.parquet", [corpus[:3000], corpus[3000:], corpus[:300]])
    train, val = (list(FileDocuments(folder, split).iterate()) for split in ("train", "val"))
    assert sorted(train + val) == sorted(corpus + corpus[:300])
    assert not set(train) & set(val)  # duplicates never straddle the splits
    assert 25 <= len(val) <= 85
    (folder / "mine.parquet").unlink()
    parquet(folder / "renamed.parquet", [list(reversed(corpus)), documents(100, 5000)])
    again = list(FileDocuments(folder, "val").iterate())
    assert set(val) <= set(again)  # decided by the text, not by its place
    middle = len(train) // 2
    assert (
        list(FileDocuments(folder, "train").iterate(middle)) == list(FileDocuments(folder, "train").iterate())[middle:]
    )


def test_a_tiny_corpus_holds_out_exactly_one_document(folder):
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"text {i}")
    train, val = (list(FileDocuments(folder, split).iterate()) for split in ("train", "val"))
    assert len(train) == 3 and len(val) == 1 and set(train + val) == {f"text {i}" for i in range(4)}


def test_too_little_to_hold_out(folder):
    (folder / "only.txt").write_text("one document")
    with pytest.raises(DataError):
        FileDocuments(folder / "only.txt")
    assert list(FileDocuments(folder / "only.txt", "all").iterate()) == ["one document"]
    (folder / "only.txt").rename(folder / "val.txt")
    with pytest.raises(DataError):  # none is left for training
        FileDocuments(folder)
    (folder / "val.txt").rename(folder / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty.txt"):
        FileDocuments(folder)
    (folder / "empty.txt").unlink()
    with pytest.raises(DataError):
        FileDocuments(folder)
    with pytest.raises(ValueError):
        FileDocuments(folder, "test")
    with pytest.raises(FileNotFoundError, match="missing"):
        find_files([folder / "missing"])


def test_hash_is_a_fixed_function():
    threshold = 2**64 // 100
    held = [i for i in range(1000) if is_held_out(f"document {i}", threshold)]
    assert held == [609, 665, 773, 860, 870, 873, 954, 989]  # recorded once: it must not change between versions


def test_resuming_over_several_files_of_all_kinds(folder):
    parquet(folder / "b.parquet", [documents(5), documents(5, 5)])
    parquet(folder / "e.parquet", [documents(3, 10)])
    (folder / "a.txt").write_text("plain")
    (folder / "c.jsonl").write_text('{"text": "j1"}\nbad\n{"text": "j2"}\n')
    (folder / "val.txt").write_text("held out")
    for spec in (FileDocuments(folder, "train"), FileDocuments(folder, "all")):
        whole = list(spec.iterate())
        for start in range(len(whole) + 2):
            assert list(spec.iterate(start)) == whole[start:]


def test_fingerprints_tell_contents_apart(folder):
    (folder / "a.txt").write_text("one")
    (folder / "val.txt").write_text("two")
    first = FileDocuments(folder).fingerprint()
    assert first == FileDocuments(folder).fingerprint() and json.loads(json.dumps(first)) == first
    assert first != FileDocuments(folder, "val").fingerprint()
    (folder / "a.txt").write_text("One")
    assert first != FileDocuments(folder).fingerprint()
    big = folder / "big.txt"
    big.write_text("word " * 500_000)
    before = FileDocuments(folder).fingerprint()
    with open(big, "r+b") as file:
        file.seek(1_234_567)
        file.write(b"X")
    os.utime(big, ns=(1, 1))
    assert before != FileDocuments(folder).fingerprint()


def test_callable_documents():
    spec = CallableDocuments("numbers", lambda start: (str(i) for i in range(start, 5)))
    assert list(spec.iterate()) == ["0", "1", "2", "3", "4"] and list(spec.iterate(3)) == ["3", "4"]
    assert spec.fingerprint() == {"kind": "callable", "name": "numbers"}
