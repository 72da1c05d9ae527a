import gzip
import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nanochat_jax.data.chat_files import describe_samples, load_chat_file
from nanochat_jax.data.chat_shapes import SHAPES, to_conversation
from nanochat_jax.data.conversation_rows import build_conversation_rows
from nanochat_jax.utils.errors import InputError
from tests.tokenizer_fixtures import golden_tokenizer

TOKENIZER = golden_tokenizer()
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
PARTS = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def everything(file):
    return [file[i] for i in range(len(file))]


ACCEPTED: list[tuple[Any, list[dict[str, Any]]]] = [
    ({"messages": PLAIN}, PLAIN),
    (PLAIN, PLAIN),
    ({"id": 7, "messages": SYSTEM, "source": "x"}, SYSTEM),
    ({"prompt": "Hi", "completion": "Hello."}, PLAIN),
    ({"prompt": "Hi", "response": "Hello."}, PLAIN),
    ({"prompt": PLAIN[:1], "completion": PLAIN[1:]}, PLAIN),
    ({"instruction": "Hi", "output": "Hello."}, PLAIN),
    ({"instruction": "Hi", "input": "", "output": "Hello."}, PLAIN),
    ({"instruction": "Add", "input": "1 2", "output": "3"},
     [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
    ({"input": "Hi", "output": "Hello."}, PLAIN),
    ({"question": "Hi", "answer": "Hello.", "system": "Be brief."}, SYSTEM),
    ({"system_prompt": "", "question": "Hi", "response": "Hello."}, PLAIN),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, PLAIN),
    ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "Human", "value": "Hi"},
                        {"from": "ChatGPT", "value": "Hello."}]}, SYSTEM),
    ({"system": "Be brief.", "conversation": [{"from": "user", "value": "Hi"}, {"from": "bot", "value": "Hello."}]},
     SYSTEM),
    ([{"role": "prompter", "text": "Hi"}, {"role": "model", "text": "Hello."}], PLAIN),
    ([{"role": "system", "content": ""}, *PLAIN], PLAIN),
    ([{"role": "developer", "content": "Be brief."}, *PLAIN], SYSTEM),
    ([{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, PLAIN[1]], PLAIN),
    ([PLAIN[0], {"role": "assistant", "content": PARTS}], [PLAIN[0], {"role": "assistant", "content": PARTS}]),
    ([*PLAIN, *PLAIN], PLAIN * 2),
    ([*PLAIN, PLAIN[0]], [*PLAIN, PLAIN[0]]),
]  # fmt: skip

REFUSED: list[Any] = [
    3, "Hi", None, {}, [], ["Hi", "Hello"], {"text": "Hi", "label": 1}, {"prompt": "Hi"}, {"messages": "Hi"},
    [{"role": "tool", "content": "x"}],
    [{"content": "x"}],
    [{"role": ["user"], "content": "x"}],
    PLAIN[::-1],
    [PLAIN[0], *PLAIN],
    [*PLAIN, SYSTEM[0]],
    [PLAIN[0]],  # no message of the assistant
    [SYSTEM[0]],
    {"prompt": " ", "completion": "x"},
    {"prompt": "x", "completion": ""},
    {"prompt": "x", "completion": None},
    {"prompt": 5, "completion": "x"},
    [{"role": "user"}, PLAIN[1]],
    [{"role": "user", "content": [{"type": "image_url"}]}, PLAIN[1]],
    [PLAIN[0], {"role": "assistant", "content": [{"type": "image", "text": "x"}]}],
    [PLAIN[0], {"role": "assistant", "content": [{"type": "text", "text": 5}]}],
    [PLAIN[0], {"role": "assistant", "content": [{"type": "text"}]}],
    [PLAIN[0], {"role": "assistant", "content": ["Hello."]}],
]  # fmt: skip


def test_the_accepted_shapes(tmp_path):
    for value, messages in ACCEPTED:
        assert to_conversation(value) == {"messages": messages}
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(json.dumps(value) for value, _ in ACCEPTED))
    file = load_chat_file(path)
    assert [c["messages"] for c in everything(file)] == [messages for _, messages in ACCEPTED]
    assert not file.problems and file.bad_lines == file.invalid_utf8 == 0
    shown = [json.loads(line.split("  (")[0]) for line in SHAPES.splitlines() if line.startswith("  ")]
    assert all(len(to_conversation(value)["messages"]) == 2 for value in shown) and len(shown) == 4


def test_bad_lines_are_told_by_number(tmp_path):
    path = tmp_path / "my.jsonl"
    lines = [json.dumps(value) for value in REFUSED]
    path.write_text("\n".join([json.dumps(PLAIN), "", *lines, "{bad", "[" * 100_000, json.dumps(SYSTEM)]))
    file = load_chat_file(path)
    assert [c["messages"] for c in everything(file)] == [PLAIN, SYSTEM]
    assert [line for line, reason in file.problems if reason] == list(range(3, 5 + len(REFUSED)))
    assert file.bad_lines == len(REFUSED) + 2
    for index in (-1, 2):
        with pytest.raises(IndexError):
            file[index]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.jsonl", b""),
        ("blank.jsonl", b"\n \n"),
        ("bad.jsonl", b"{}\n3\nx\n4\n"),
        ("numbers.json", b"[1, 2]"),
        ("none.json", b"[]"),
        ("f.txt", b"Hi"),
        ("wide.jsonl", '{"a": "é"}'.encode("utf-16")),
        ("h.jsonl.gz", b"no gzip"),
        ("torn.jsonl.gz", gzip.compress(b"[]" * 1000, mtime=0)[:-20]),
    ],
)
def test_nothing_usable_names_the_file_and_the_shapes(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name) as caught:
        load_chat_file(tmp_path / name)
    assert (SHAPES in str(caught.value)) == (name.split(".")[0] in ("empty", "blank", "bad", "numbers", "none"))
    with pytest.raises(InputError, match="missing.jsonl"):
        load_chat_file(tmp_path / "missing.jsonl")


TWO = [{"messages": PLAIN}, {"prompt": "2", "completion": "b"}]
EXPECTED = [PLAIN, [{"role": "user", "content": "2"}, {"role": "assistant", "content": "b"}]]
LONG = [PLAIN[0], {"role": "assistant", "content": "x" * 300_000}]
ONE_A_LINE = "\n".join(map(json.dumps, TWO))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("lines.jsonl", ONE_A_LINE, EXPECTED),
        ("crlf.jsonl", ONE_A_LINE.replace("\n", "\r\n") + "\r\n", EXPECTED),
        ("bom.jsonl", "\ufeff" + ONE_A_LINE, EXPECTED),
        ("indented.json", json.dumps(TWO, indent=2), EXPECTED),
        ("one_line.json", json.dumps(TWO), EXPECTED),
        ("lists.json", json.dumps([PLAIN, SYSTEM]), [PLAIN, SYSTEM]),
        ("lists_indented.json", "\ufeff\n" + json.dumps([PLAIN, SYSTEM], indent=1), [PLAIN, SYSTEM]),
        ("item_a_line.json", "[" + ",\n".join(map(json.dumps, TWO)) + "]", EXPECTED),
        ("bracket_first.json", "[\n" + ",\n".join(map(json.dumps, TWO)) + "\n]\n", EXPECTED),
        ("alone.jsonl", json.dumps(PLAIN), [PLAIN]),
        ("alone_indented.json", json.dumps(PLAIN, indent=1), [PLAIN]),
        ("object_indented.json", json.dumps(TWO[0], indent=1), [PLAIN]),
        ("long.jsonl", "\n".join([json.dumps(LONG)] * 3), [LONG] * 3),
        ("bad_first.jsonl", '{"messages": [\n' + ONE_A_LINE, EXPECTED),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_layouts_of_a_file(tmp_path, name, text, expected, zipped):
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    file = load_chat_file(path)
    assert [c["messages"] for c in everything(file)] == expected
    assert [line for line, _ in file.problems] == ([1] if name.startswith("bad") else [])
    left = [p for p in (tmp_path / "base").rglob("*") if p.is_file()]
    assert not left, "temporary files have no name"


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9", "completion": "\\ud800 \xff\xff"}\n' + json.dumps(PLAIN).encode())
    file = load_chat_file(path)
    assert file.invalid_utf8 == 3 and len(file) == 2
    assert [m["content"] for m in file[0]["messages"]] == ["caf\ufffd", "\ud800 \ufffd\ufffd"]
    rows = build_conversation_rows(file, TOKENIZER, 64, packing="best_fit", split="train", out_dir=tmp_path / "rows")
    assert rows.manifest["conversations"] == 2  # half a UTF-16 pair does no harm either


# --- held out -----------------------------------------------------------------------------------------------


def numbered(tmp_path, count, name="my.jsonl", start=0):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(start, count)))
    return path


def sides(file, one_in=20):
    """The questions of the two parts."""
    train, val = ({c["messages"][0]["content"] for c in everything(part)} for part in file.held_out(one_in))
    assert not train & val
    return train, val


def test_held_out_by_content(tmp_path):
    file = load_chat_file(numbered(tmp_path, 4000))
    train, val = sides(file)
    assert len(train | val) == 4000 and 140 < len(val) < 260
    again = sides(load_chat_file(numbered(tmp_path, 4100, "more.jsonl", start=100)))
    assert not train & again[1] and not val & again[0]  # other places, the same decision
    assert abs(len(sides(file, 2)[0]) - 2000) < 150
    with pytest.raises(InputError, match="one_in"):
        file.held_out(1)
    for count in range(1, 30, 4):  # of few
        path = numbered(tmp_path, count)
        path.write_text(path.read_text() * 2)  # everything twice
        train, val = sides(load_chat_file(path), 2)
        assert train and len(train | val) == count and bool(val) == (count > 1)


def test_fingerprint_follows_the_content(tmp_path):
    first = load_chat_file(numbered(tmp_path, 50))
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps([{"question": f"q{i}", "answer": f"a{i}"} for i in range(50)], indent=1))
    same = load_chat_file(shapes)
    assert first.fingerprint() == same.fingerprint() and everything(first) == everything(same)
    others = [load_chat_file(numbered(tmp_path, 49, "b.jsonl")), *first.held_out(3)]
    assert len({file.fingerprint() for file in [first, *others]}) == 4


def test_shuffled_by_the_seed(tmp_path):
    file = load_chat_file(numbered(tmp_path, 300))
    orders = [everything(file.shuffled(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and everything(file) not in orders
    assert all(sorted(map(str, order)) == sorted(map(str, everything(file))) for order in orders)
    assert file.shuffled(1).fingerprint() != file.shuffled(2).fingerprint()


# --- large files ----------------------------------------------------------------------------------------------


def test_memory_is_the_places_not_the_text(tmp_path):
    path = tmp_path / "large.jsonl"
    with open(path, "w") as out:
        for i in range(5000):
            out.write(json.dumps({"prompt": f"question {i}", "completion": "word " * 100}) + "\n")
    tracemalloc.start()
    file = load_chat_file(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file) == 5000 and held < 125_000 and peak < 1_000_000 < path.stat().st_size / 2
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda i: file[i]["messages"][0]["content"], range(0, 5000, 50)))
    assert asked == [f"question {i}" for i in range(0, 5000, 50)]


def test_a_file_that_changes_is_noticed(tmp_path):
    path = numbered(tmp_path, 20)
    file = load_chat_file(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"q7", b"q8"))
    assert file[6]["messages"][0]["content"] == "q6"
    with pytest.raises(InputError, match="my.jsonl"):
        file[7]
    path.write_bytes(data[:100])
    with pytest.raises(InputError, match="my.jsonl"):
        file[15]


# --- shown ----------------------------------------------------------------------------------------------------


def test_samples_show_what_is_trained_on(tmp_path):
    path = tmp_path / "my.jsonl"
    calls = [PLAIN[0], {"role": "assistant", "content": [*PARTS, {"type": "text", "text": "It is\n2."}]}]
    long = {"prompt": "why?", "completion": "because " * 200}
    path.write_text("\n".join(map(json.dumps, [SYSTEM, calls, long, PLAIN])))
    text = describe_samples(load_chat_file(path), TOKENIZER)  # stdout is no terminal here
    ids, mask = TOKENIZER.render_conversation({"messages": SYSTEM})
    lines = text.splitlines()
    assert lines[:6] == [
        f"sample 1 of 4: {len(ids)} tokens, {sum(mask)} of them trained on",
        "  read  | <|bos|><|user_start|>Be brief.\\n\\nHi<|user_end|><|assistant_start|>",
        "  learn | Hello.<|assistant_end|>",
        lines[3],
        "  read  | <|bos|><|user_start|>Hi<|user_end|><|assistant_start|>",
        "  learn | <|python_start|>1+1<|python_end|>",
    ]
    assert lines[6:8] == ["  read  | <|output_start|>2<|output_end|>", "  learn | It is\\n2.<|assistant_end|>"]
    assert lines[-1].endswith("more characters") and len(lines[-1]) < 500 and text.count("sample") == 3
    assert "\033" not in text
    colored = describe_samples(load_chat_file(path), TOKENIZER, n=1, color=True)
    assert "\033[92m" in colored and "\033[91m<|bos|>" in colored and colored.count("sample") == 1
    assert describe_samples([], TOKENIZER) == ""
