import gzip
import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nanochat_jax.data.chat_files import SHAPES, describe_samples, load_chat_file, to_conversation
from nanochat_jax.data.conversation_rows import build_conversation_rows
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

REFUSED: list[tuple[Any, str]] = [
    (3, "a JSON number is no conversation"),
    ("Hi", "a JSON string is no conversation"),
    (None, "a JSON null is no conversation"),
    ({}, "unknown keys ()"),
    ({"text": "Hi", "label": 1}, "unknown keys (text, label); known are messages"),
    ({"prompt": "Hi"}, "unknown keys (prompt)"),
    ({"messages": "Hi"}, "'messages' holds a string, not a list"),
    ([], "no messages"),
    (["Hi", "Hello"], "message 0 is a JSON string"),
    ([{"role": "tool", "content": "x"}], "message 0 has role 'tool'; known are user, human"),
    ([{"content": "x"}], "message 0 has role None"),
    ([{"role": ["user"], "content": "x"}], "message 0 has role ['user']"),
    (PLAIN[::-1], "message 0 has role 'assistant' where 'user' is due"),
    ([PLAIN[0], *PLAIN], "message 1 has role 'user' where 'assistant' is due"),
    ([*PLAIN, SYSTEM[0]], "message 2 has role 'system' where 'user' is due"),
    ([PLAIN[0]], "no message of the assistant"),
    ([SYSTEM[0]], "nothing after its system message"),
    ({"prompt": " ", "completion": "x"}, "message 0 (user) is empty"),
    ({"prompt": "x", "completion": ""}, "message 1 (assistant) is empty"),
    ({"prompt": "x", "completion": None}, "unknown content type"),
    ({"prompt": 5, "completion": "x"}, "must be a string"),
    ([{"role": "user"}, PLAIN[1]], "must be a string"),
    ([{"role": "user", "content": [{"type": "image_url"}]}, PLAIN[1]], "message 0 (user) has parts other than text"),
    ([PLAIN[0], {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "unknown part type 'image'"),
    ([PLAIN[0], {"role": "assistant", "content": [{"type": "text", "text": 5}]}], "a part's text is a number"),
    ([PLAIN[0], {"role": "assistant", "content": [{"type": "text"}]}], "no key 'text'"),
    ([PLAIN[0], {"role": "assistant", "content": ["Hello."]}], "indices"),
]


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
    lines = [json.dumps(value) for value, _ in REFUSED]
    path.write_text("\n".join([json.dumps(PLAIN), "", *lines, "{bad", "[" * 100_000, json.dumps(SYSTEM)]))
    file = load_chat_file(path)
    assert [c["messages"] for c in everything(file)] == [PLAIN, SYSTEM]
    assert [line for line, _ in file.problems] == list(range(3, 5 + len(REFUSED)))
    assert file.bad_lines == len(file.problems) == len(REFUSED) + 2
    for (_, reason), (_, expected) in zip(file.problems, REFUSED, strict=False):
        assert expected in reason
    assert [reason for _, reason in file.problems[-2:]] == [
        "no JSON (Expecting property name enclosed in double quotes at column 2)", "nested too deeply"]  # fmt: skip
    for index in (-1, 2):
        with pytest.raises(IndexError):
            file[index]


def test_nothing_usable_names_the_file_and_the_shapes(tmp_path):
    cases: list[tuple[str, bytes, str]] = [
        ("a.jsonl", b"", "a.jsonl holds no conversation, it is empty"),
        ("b.jsonl", b"\n \n", "b.jsonl holds no conversation, it is empty"),
        ("c.jsonl", b"{}\n3\nx\n4\n", r"all 4 lines are bad:\n  line 1: unknown keys.*\n  line 2.*\n  line 3: no JSON"),
        ("d.json", b"[1, 2]", "all 2 items are bad:\n  item 1: a JSON number"),
        ("e.json", b"[]", "no conversation"),
        ("f.txt", b"Hi", "f.txt: cannot read this kind of file"),
        ("g.jsonl", '{"a": "é"}'.encode("utf-16"), "g.jsonl is binary or UTF-16"),
        ("h.jsonl.gz", b"no gzip", "h.jsonl.gz is no readable gzip file"),
        ("i.jsonl.gz", gzip.compress(b"[]" * 1000)[:-20], "i.jsonl.gz is no readable gzip file"),
    ]
    for name, data, message in cases:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            load_chat_file(tmp_path / name)
        assert ("holds no conversation" not in message) or SHAPES in str(caught.value)
    with pytest.raises(ValueError, match="no file .*missing.jsonl"):
        load_chat_file(tmp_path / "missing.jsonl")


TWO = [{"messages": PLAIN}, {"prompt": "2", "completion": "b"}]
EXPECTED = [PLAIN, [{"role": "user", "content": "2"}, {"role": "assistant", "content": "b"}]]
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


def test_held_out_by_content(tmp_path):
    file = load_chat_file(numbered(tmp_path, 4000))
    train, val = file.held_out()
    asked = [{c["messages"][0]["content"] for c in everything(part)} for part in (train, val)]
    assert len(train) + len(val) == 4000 and not asked[0] & asked[1] and 140 < len(val) < 260
    more = load_chat_file(numbered(tmp_path, 4100, "more.jsonl", start=100))  # other places, the same decision
    again = [{c["messages"][0]["content"] for c in everything(part)} for part in more.held_out()]
    assert not asked[0] & again[1] and not asked[1] & again[0]
    half = file.held_out(one_in=2)
    assert abs(len(half[0]) - 2000) < 150
    assert [c["messages"][0]["content"] for c in everything(val)] == sorted(asked[1], key=lambda q: int(q[1:]))
    with pytest.raises(ValueError, match="one_in is 1"):
        file.held_out(1)


def test_held_out_of_few(tmp_path):
    for count in range(1, 30):
        path = tmp_path / f"{count}.jsonl"
        line = [json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(count)]
        path.write_text("".join(line + line))  # everything twice
        train, val = load_chat_file(path).held_out(2)
        sides = [{c["messages"][0]["content"] for c in everything(part)} for part in (train, val)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == count
        assert sides[0] and (bool(sides[1]) == (count > 1))


def test_fingerprint_follows_the_content(tmp_path):
    first = load_chat_file(numbered(tmp_path, 50))
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps([{"question": f"q{i}", "answer": f"a{i}"} for i in range(50)], indent=1))
    same = load_chat_file(shapes)
    assert first.fingerprint() == same.fingerprint() and everything(first) == everything(same)
    others = [load_chat_file(numbered(tmp_path, 49, "b.jsonl")), *first.held_out(3)]
    assert len({file.fingerprint() for file in [first, *others]}) == 4


# --- large files ----------------------------------------------------------------------------------------------


def test_memory_is_the_places_not_the_text(tmp_path):
    path = tmp_path / "large.jsonl"
    with open(path, "w") as out:
        for i in range(20_000):
            out.write(json.dumps({"prompt": f"question {i}", "completion": "word " * 100}) + "\n")
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    file = load_chat_file(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file) == 20_000 and held < 500_000 and peak < 1_500_000
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda i: file[i]["messages"][0]["content"], range(0, 20_000, 50)))
    assert asked == [f"question {i}" for i in range(0, 20_000, 50)]


def test_a_long_line(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x" * 300_000}) + "\n" for i in range(3)))
    file = load_chat_file(path)
    assert [len(c["messages"][1]["content"]) for c in everything(file)] == [300_000] * 3


def test_a_file_that_changes_is_noticed(tmp_path):
    path = numbered(tmp_path, 20)
    file = load_chat_file(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"q7", b"q8"))
    assert file[6]["messages"][0]["content"] == "q6"
    with pytest.raises(ValueError, match="my.jsonl was changed while"):
        file[7]
    path.write_bytes(data[:100])
    with pytest.raises(ValueError, match="my.jsonl was changed while"):
        file[15]


# --- shown ----------------------------------------------------------------------------------------------------


def test_samples_show_what_is_learnt(tmp_path):
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
