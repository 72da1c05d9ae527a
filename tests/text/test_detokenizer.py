"""Tokens to what a reader sees, messages to prompts."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.text import chat_format
from nanochat_jax.text.detokenizer import (
    CompletionStream,
    PlainText,
    Text,
    ToolCall,
    ToolResult,
    as_parts,
    as_text,
)
from nanochat_jax.text.prompts import ContextOverflow, MessageError, chat_prompt, fit_history, parts_of_text
from nanochat_jax.text.tokenizer import Tokenizer
from tests.tokenizer_fixtures import golden_tokenizer

TOKENIZER = golden_tokenizer()
SPECIAL = TOKENIZER.special_tokens
PYTHON_START, PYTHON_END = SPECIAL[chat_format.PYTHON_START], SPECIAL[chat_format.PYTHON_END]
OUTPUT_START, OUTPUT_END = SPECIAL[chat_format.OUTPUT_START], SPECIAL[chat_format.OUTPUT_END]
END = SPECIAL[chat_format.ASSISTANT_END]
STOCK = Tokenizer([bytes([i]) for i in range(256)], {"<|endoftext|>": 256}, bos="<|endoftext|>")


def ids(text):
    return TOKENIZER.encode_text(text)


def run(tokens, stop=(), cuts=None, tokenizer=TOKENIZER):
    """(stream, pieces) of tokens pushed in runs of the given lengths (default: one at a time)."""
    stream = CompletionStream(tokenizer, stop)
    pieces, tokens = [], list(tokens)
    for n in cuts if cuts is not None else itertools.repeat(1, len(tokens)):
        pieces += stream.push(tokens[:n])
        del tokens[:n]
    pieces += stream.push(tokens) + stream.finish()
    assert as_text(pieces) == stream.text == as_text(stream.pieces)
    assert all(p.text for p in pieces if isinstance(p, Text))
    return stream, pieces


def joined(pieces):
    return "".join(p.text for p in pieces if isinstance(p, Text))


CALL = [PYTHON_START, *ids("12+30"), PYTHON_END, OUTPUT_START, *ids("42"), OUTPUT_END]


def test_a_completion_with_a_tool_call():
    _, pieces = run([*ids("It is "), *CALL, *ids(" 42."), END, *ids("never seen")], cuts=[100])
    assert pieces == [Text("It is "), ToolCall("12+30"), ToolResult("42"), Text(" 42.")]
    assert as_text(pieces) == "It is <12+30=42> 42."
    assert as_parts(pieces) == [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": " 42."},
    ]


@pytest.mark.parametrize(
    "tokens,expected",
    [
        ([PYTHON_START, *ids("12+")], "<12+>"),  # the answer ended inside a call
        ([PYTHON_START, *ids("x"), PYTHON_END, *ids("?"), END], "<x>?"),  # the calculator refused
        ([PYTHON_START, *ids("1"), PYTHON_START, *ids("2"), PYTHON_END, END], "<1><2>"),
        ([OUTPUT_START, *ids("7"), OUTPUT_END, *ids("!")], "<=7>!"),  # the model made a result up
        ([PYTHON_START, PYTHON_END, *ids("a"), PYTHON_END, OUTPUT_END, OUTPUT_START, END], "a"),
        ([PYTHON_START, *ids("1+1"), OUTPUT_START, *ids("2"), PYTHON_END, *ids("3"), OUTPUT_END], "<1+1=23>"),
        ([PYTHON_START, *ids("1+1"), END, OUTPUT_START], "<1+1>"),
        ([SPECIAL[chat_format.USER_START], *ids("a"), SPECIAL[chat_format.USER_END], *ids("b")], "ab"),
        ([*ids("a"), TOKENIZER.bos_id, *ids("b")], "a"),
    ],
)
def test_odd_tool_tokens_never_show(tokens, expected):
    stream, pieces = run(tokens)
    assert as_text(pieces) == expected and "<|" not in stream.text


def test_plain_text_grows_only_at_its_end():
    plain, pieces = PlainText(), [Text("a"), ToolCall("1+1"), ToolResult("2"), ToolCall("x"), Text("b"), ToolCall("y")]
    parts = [plain.push([p]) for p in pieces] + [plain.finish()]
    assert parts == ["a", "<1+1", "=2>", "<x", ">b", "<y", ">"]
    assert "".join(parts) == as_text(pieces)


def test_every_split_of_multibyte_characters():
    """Each cut of the bytes into tokens gives the text and no replacement character."""
    text = "é🚀"
    data = text.encode()
    for cuts in itertools.product([False, True], repeat=len(data) - 1):
        groups, current = [], bytes(data[:1])
        for cut, byte in zip(cuts, data[1:], strict=True):
            if cut:
                groups, current = [*groups, current], b""
            current += bytes([byte])
        groups.append(current)
        extra = sorted({g for g in groups if len(g) > 1})
        ranks = [bytes([i]) for i in range(256)] + extra
        tokenizer = Tokenizer(ranks, {"<|bos|>": len(ranks)})
        tokens = [g[0] if len(g) == 1 else 256 + extra.index(g) for g in groups]
        _, pieces = run(tokens, tokenizer=tokenizer)
        assert joined(pieces) == text and not any("\ufffd" in p.text for p in pieces if isinstance(p, Text))


def test_an_unfinished_character_is_replaced_where_it_stands():
    stream = CompletionStream(TOKENIZER)
    assert stream.push("🚀".encode()[:3]) == []
    assert stream.finish() == [Text("\ufffd")] and stream.push(ids("more")) == [] == stream.finish()
    _, pieces = run([*"é".encode()[:1], *CALL])
    assert pieces == [Text("\ufffd"), ToolCall("12+30"), ToolResult("42")]


def slow_stop(text, stops):
    """The text before the first stop string completed, looking after every character."""
    for n in range(len(text) + 1):
        ended = [len(s) for s in stops if text[:n].endswith(s)]
        if ended:
            return text[: n - max(ended)], True
    return text, False


@settings(max_examples=150, deadline=None)
@given(st.text("ab🚀", max_size=12), st.lists(st.text("ab🚀", min_size=1, max_size=4), max_size=3), st.randoms())
def test_stop_strings(text, stops, rng: random.Random):
    tokens = list(text.encode())
    cuts = [rng.randint(1, 4) for _ in tokens]
    stream, pieces = run(tokens, stops, cuts)
    assert (joined(pieces), stream.stopped) == slow_stop(text, stops)


def test_a_possible_stop_string_is_held_back_and_given_up():
    stream = CompletionStream(TOKENIZER, ["END", "NO!"])
    assert stream.push(ids("say E")) == [Text("say ")]
    assert stream.push(list(b"N")) == []
    assert stream.push(list(b"O")) == [Text("E")], "NO may still become NO!"
    assert stream.finish() == [Text("NO")] and stream.text == "say ENO" and not stream.stopped
    stream = CompletionStream(TOKENIZER, ["END"])
    assert stream.push(list(b"xENDy")) == [Text("x")] and stream.stopped
    assert stream.push(ids("more")) == [] == stream.finish() and stream.text == "x"


def test_stop_strings_do_not_reach_over_or_into_a_tool_call():
    stream, pieces = run([*ids("a 1"), *CALL, *ids("2 b")], ["12", "+", "42"])
    assert not stream.stopped and as_text(pieces) == "a 1<12+30=42>2 b"
    stream, pieces = run([*ids("a"), *CALL, *ids("stop"), *CALL], ["stop"])
    assert stream.stopped and as_text(pieces) == "a<12+30=42>"


@pytest.mark.parametrize("stop", ["END", [""], ["a", ""], [3]])
def test_bad_stop_strings(stop):
    with pytest.raises(ValueError, match="stop"):
        CompletionStream(TOKENIZER, stop)


def test_a_stock_tokenizer_without_chat_tokens():
    stream, pieces = run([*b"h\xc3", *b"\xa9 <|bos|>", 256, *b"x"], tokenizer=STOCK)
    assert pieces and stream.text == "hé <|bos|>"
    with pytest.raises(MessageError, match="bos|conversation"):
        chat_prompt([{"role": "user", "content": "hi"}], STOCK)


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "plain", "<b>bold</b>", "<a=b>", "<1+1=3>", "<1+1>", "x < 3 = y > 2", "<=7>", "<"]
)
def test_text_that_is_no_tool_call_stays_text(text):
    assert parts_of_text(text) == ([{"type": "text", "text": text}] if text else [])


def test_written_calls_come_back():
    for expression, result in [("12+30", "42"), ("1,000/4", "250.0"), ("'strawberry'.count('r')", "3")]:
        pieces = [Text("a "), ToolCall(expression), ToolResult(result), ToolCall("1-1"), ToolResult("0"), Text("<b>")]
        assert parts_of_text(as_text(pieces)) == as_parts(pieces)


def test_prompt_is_what_training_saw():
    pieces = run([*ids("It is "), *CALL, *ids(" 42."), END])[1]
    for content in (as_text(pieces), as_parts(pieces)):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "12+30?"},
            {"role": "assistant", "content": content},
            {"role": "user", "content": [{"type": "text", "text": "Sure"}, {"type": "text", "text": "? <|bos|>"}]},
        ]
        prompt = chat_prompt(messages, TOKENIZER)
        expected = [TOKENIZER.bos_id, SPECIAL[chat_format.USER_START], *ids("Be brief.\n\n12+30?")]
        expected += [SPECIAL[chat_format.USER_END], SPECIAL[chat_format.ASSISTANT_START], *ids("It is "), *CALL]
        expected += [*ids(" 42."), END, SPECIAL[chat_format.USER_START], *ids("Sure? <|bos|>")]
        assert prompt == [*expected, SPECIAL[chat_format.USER_END], SPECIAL[chat_format.ASSISTANT_START]]
    messages[0] = {"role": "developer", "content": "Be brief."}
    assert chat_prompt(messages, TOKENIZER) == prompt
    long = [{"role": "user", "content": "word " * 5000}]
    assert len(chat_prompt(long, TOKENIZER)) > 4000, "never cut"


U, A, S = ({"role": r, "content": "x"} for r in ("user", "assistant", "system"))


def of(text: str) -> list[dict]:
    """ "u:one a:two" as messages."""
    roles = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}
    return [{"role": roles[r], "content": c.replace("_", "\n\n")} for r, c in (m.split(":") for m in text.split())]


# messages in an order that training never saw -> the same as a conversation
ORDERS = [
    ("u:A u:B", "u:A_B"),
    ("u:A u:B u:C a:D u:E u:F", "u:A_B_C a:D u:E_F"),
    ("u:A a:B a:C u:D", "u:A a:B_C u:D"),
    ("s:A s:B u:C", "u:A_B_C"),
    ("s:A d:B s:C u:D", "u:A_B_C_D"),
    ("s:A", "u:A"),
    ("s:A s:B", "u:A_B"),
    ("u:A s:B", "u:A_B"),
    ("u:A s:B u:C", "u:A_B_C"),
    ("u:A a:B s:C u:D", "u:A a:B u:C_D"),
    ("u:A a:B u:C s:D", "u:A a:B u:C_D"),
    ("u:A a:B s:C", "u:A a:B u:C"),
    ("s:A u:B a:C d:D s:E u:F", "u:A_B a:C u:D_E_F"),
    ("a:A u:B", "u: a:A u:B"),
    ("s:A a:B u:C", "u:A a:B u:C"),
    ("a:A a:B s:C u:D", "u: a:A_B u:C_D"),
    ("s: u:A", "u:A"),
    ("u:A u: u:B", "u:A_B"),
    ("u:A a: a:B u:C", "u:A a:B u:C"),
    ("u:A a: u:B", "u:A a: u:B"),
]


@pytest.mark.parametrize("messages,same", ORDERS)
def test_messages_come_in_any_order(messages, same):
    prompt = chat_prompt(of(messages), TOKENIZER)
    assert prompt == TOKENIZER.render_for_completion({"messages": [*of(same), {"role": "assistant", "content": ""}]})
    assert fit_history(of(messages), TOKENIZER, len(prompt), 1) == (prompt, 0)


@pytest.mark.parametrize("messages,same", [(m, s) for m, s in ORDERS if len(s.split()) % 2])
@pytest.mark.parametrize("last", ["a:X", "a:X a:Y", "a:", "a:x_"])
def test_the_assistants_last_message_is_continued(messages, same, last):
    joined = "_".join(m[2:] for m in last.split())
    prompt = chat_prompt(of(f"{messages} {last}"), TOKENIZER)
    assert prompt == [*chat_prompt(of(messages), TOKENIZER), *ids(joined.replace("_", "\n\n"))]
    assert fit_history(of(f"{messages} {last}"), TOKENIZER, len(prompt), 1) == (prompt, 0)
    another = chat_prompt(of(f"{messages} {last}"), TOKENIZER, resume=False)
    assert another == [*prompt, END, SPECIAL[chat_format.ASSISTANT_START]]
    assert chat_prompt(of(f"{messages} {last}"), TOKENIZER, resume=False, prime=False) == another[:-1]
    assert same.split()[-1].startswith("u")


def test_calls_are_continued_and_joined_as_calls():
    parts = as_parts(run([*ids("a"), *CALL])[1])
    for content in (parts, as_text(run([*ids("a"), *CALL])[1]), [*parts, {"type": "text", "text": ""}]):
        answers = [{"role": "assistant", "content": content}]
        assert chat_prompt([U, *answers], TOKENIZER) == [*chat_prompt([U], TOKENIZER), *ids("a"), *CALL]
        joined = chat_prompt([U, *answers, *answers], TOKENIZER)
        assert joined == [*chat_prompt([U, *answers], TOKENIZER), *ids("\n\na"), *CALL]
    assert chat_prompt([U, {"role": "assistant", "content": None}], TOKENIZER) == chat_prompt([U], TOKENIZER)


PARTS = [
    ["a", "b"], [{"text": "a"}, "b"], [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}],
    [{"type": "text", "text": "ab", "cache_control": {"type": "ephemeral"}}],
    [{"type": None, "text": "a"}, {"type": "text", "text": "b"}, ""],
]  # fmt: skip


@pytest.mark.parametrize("content", PARTS)
@pytest.mark.parametrize("role", ["system", "user"])
def test_parts_of_a_text(content, role):
    message = {"role": role, "content": content, "name": "x", "unknown": {}}
    assert chat_prompt([message], TOKENIZER) == chat_prompt(of("u:ab"), TOKENIZER)


def test_what_is_continued_is_never_dropped():
    messages = of("s:S u:A a:B u:C a:D u:E a:F")
    whole = chat_prompt(messages, TOKENIZER)
    for capacity in range(len(chat_prompt(of("s:S u:E a:F"), TOKENIZER)), len(whole) + 1):
        prompt, dropped = fit_history(messages, TOKENIZER, capacity, 1)
        assert len(prompt) <= capacity and prompt == chat_prompt([messages[0], *messages[1 + dropped :]], TOKENIZER)
    with pytest.raises(ContextOverflow):
        fit_history(messages, TOKENIZER, len(chat_prompt(of("s:S u:E a:F"), TOKENIZER)) - 1, 1)


@pytest.mark.parametrize(
    "messages,index",
    [
        ([], None),
        ([{"role": "tool", "content": "x"}], 0),
        ([{"role": ["user"], "content": "x"}], 0),
        ([{"content": "x"}], 0),
        (["hello"], 0),
        ([{"role": "user"}], 0),
        ([{"role": "user", "content": 3}], 0),
        ([{"role": "user", "content": [{"type": "image_url"}]}], 0),
        ([{"role": "user", "content": None}], 0),
        ([S, {"role": "user", "content": [{"type": "python", "text": "1+1"}]}], 1),
        ([U, {"role": "assistant", "content": 3}, U], 1),
        ([U, {"role": "assistant", "content": [{"type": "python"}]}, U], 1),
        ([U, {"role": "assistant", "content": [{"type": "text", "text": "a"}, 3]}, U], 1),
    ],
)
def test_bad_messages_are_named(messages, index):
    for make in (chat_prompt, lambda m, t: fit_history(m, t, 1000, 10)):
        with pytest.raises(MessageError) as caught:
            make(messages, TOKENIZER)
        assert caught.value.index == index
        assert index is None or str(caught.value).startswith(f"message {index}: ")


def talk(turns, rng):
    words = ["sun", "moon ", " 12", "\n\n", "naïve", "🚀", " and"]
    sides = itertools.cycle(["user", "assistant"])
    return [{"role": next(sides), "content": "".join(rng.choices(words, k=rng.randint(0, 20)))} for _ in range(turns)]


def test_the_oldest_exchanges_go_first():
    rng = random.Random(1)
    for trial in range(150):
        head = [{"role": "system", "content": "Be kind. " * rng.randint(1, 5)}] if trial % 2 else []
        body = talk(rng.choice([1, 3, 5, 9, 21]), rng)
        capacity, reserve = rng.choice([80, 150, 400]), rng.choice([0, 1, 40])
        sizes = [len(chat_prompt(head + body[n:], TOKENIZER)) for n in range(0, len(body), 2)]
        fitting = [n for n, size in enumerate(sizes) if size + reserve - 1 <= capacity]
        if not fitting:
            with pytest.raises(ContextOverflow) as caught:
                fit_history(head + body, TOKENIZER, capacity, reserve)
            error = caught.value
            assert (error.n_tokens, error.capacity, error.reserve) == (sizes[-1], capacity, reserve)
            continue
        prompt, dropped = fit_history(head + body, TOKENIZER, capacity, reserve)
        assert dropped == 2 * fitting[0]
        assert prompt == chat_prompt(head + body[dropped:], TOKENIZER)


def test_many_messages_are_fitted_quickly():
    """Few renderings of the conversation, not one for each exchange dropped."""
    calls = 0

    class Counting(Tokenizer):
        def encode_text(self, text):
            nonlocal calls
            calls += 1
            return super().encode_text(text)

    tokenizer = Counting(TOKENIZER.ranks, SPECIAL)
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"message number {i}"} for i in range(501)]
    _, dropped = fit_history(messages, tokenizer, 200, 50)
    assert dropped > 450 and calls <= 502
