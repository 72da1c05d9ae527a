"""The chat page in a real Chromium: talking, stopping, asking again, many chats, commands, settings, tools."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.web_server import Fail, Gate, Raw, Tool

pytest_plugins = ["tests.page_browser"]


def sent(stub, index: int = -1) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in stub.requests[index]["messages"]]


# --- streaming ------------------------------------------------------------------------------------------------------


def test_the_first_visit_offers_examples_that_can_be_asked(chat, stub):
    expect(chat.page.get_by_role("heading", name="Talk to tiny-sft")).to_be_visible()
    chat.button("What is 34 + 27?").click()
    expect(chat.answer).to_have_text("An answer.")
    assert sent(stub) == [("user", "What is 34 + 27?")]
    expect(chat.page.get_by_role("list", name="Examples")).to_have_count(0)


def test_text_is_shown_while_it_comes(chat, stub):
    first, second = Gate(), Gate()
    stub.script(first, "One, ", second, "two.")
    chat.ask("Count")
    expect(chat.questions.last).to_have_text("Count")
    expect(chat.answers.last.locator(".dots")).to_be_visible()  # before anything has come
    expect(chat.page.locator("#log")).to_have_attribute("aria-busy", "true")
    first.open()
    expect(chat.answer).to_have_text("One,")
    expect(chat.button("Stop")).to_be_visible()
    second.open()
    expect(chat.answer).to_have_text("One, two.")
    chat.done()
    expect(chat.button("Stop")).to_be_hidden()
    (kept,) = chat.stored()
    assert [m["content"] for m in kept["messages"]] == ["Count", "One, two."]
    body = stub.requests[0]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}


def test_events_and_characters_may_be_cut_anywhere(chat, stub):
    data = {"choices": [{"index": 0, "delta": {"content": "naïve 🙂 日本"}, "finish_reason": None}]}
    event = b": a comment\r\n\r\ndata: " + json.dumps(data, ensure_ascii=False).encode() + b"\r\n\r\n"
    cuts = [0, 3, 19, event.index("ï".encode()) + 1, event.index("🙂".encode()) + 2, len(event) - 3, len(event)]
    stub.script(*(Raw(event[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)), *(Raw(bytes([b])) for b in b"\n"))
    chat.talk("Go")
    expect(chat.answer).to_have_text("naïve 🙂 日本")


def test_the_view_follows_the_answer_only_if_it_was_at_the_end(chat, stub):
    gate = Gate()
    stub.script("line\n\n" * 60, gate, "line\n\n" * 10 + "the end")
    chat.ask("Go")
    to_end = chat.button("Scroll to the latest message")
    expect(chat.answer.locator("p")).to_have_count(60)
    expect(chat.answer.locator("p").last).to_be_in_viewport()
    expect(to_end).to_be_hidden()
    chat.page.mouse.move(600, 400)
    chat.page.mouse.wheel(0, -600)
    expect(to_end).to_be_visible()
    gate.open()
    chat.done()
    expect(chat.answer.get_by_text("the end")).not_to_be_in_viewport()
    to_end.click()
    expect(chat.answer.get_by_text("the end")).to_be_in_viewport()


# --- stop, regenerate, edit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_keeps_what_came_and_hangs_up(chat, stub, how):
    stub.script("Part one,", Gate())
    chat.ask("Talk")
    expect(chat.answer).to_have_text("Part one,")
    if how == "button":
        chat.button("Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    expect(chat.note).to_have_text("Stopped.")
    expect(chat.answer).to_have_text("Part one,")
    expect(chat.input).to_be_focused()
    chat.talk("Go on")
    assert sent(stub) == [("user", "Talk"), ("assistant", "Part one,"), ("user", "Go on")]
    assert stub.cancelled == 1
    assert chat.stored()[0]["messages"][1]["end"] == "stopped"
    stub.script(Gate())
    chat.ask("Talk")
    chat.button("Stop").click()
    expect(chat.note).to_have_text("Stopped.")
    chat.talk("Again")  # nothing came, so the model sees one user turn, not two in a row
    assert sent(stub)[-1] == ("user", "Talk\n\nAgain")


def test_regenerate_drops_what_came_after_and_can_be_undone(chat, stub):
    for number in (1, 2):
        stub.script(f"Answer {number}.")
        chat.talk(f"Question {number}")
    chat.ask("/topk")  # the page's own lines are no messages: they must not shift what is removed
    stub.script("Better.")
    chat.button("Regenerate", chat.answers.first).click()
    expect(chat.answers).to_have_count(1)
    expect(chat.answer).to_have_text("Better.")
    expect(chat.questions).to_have_text(["Question 1"])
    assert sent(stub) == [("user", "Question 1")]
    chat.done()
    chat.button("Undo").click()
    expect(chat.answer).to_have_text("Answer 2.")
    assert [m["content"] for m in chat.stored()[0]["messages"]][1::2] == ["Answer 1.", "Answer 2."]


def test_edit_and_send_again(chat, stub):
    for number in (1, 2):
        stub.script(f"Answer {number}.")
        chat.talk(f"Question {number}")
    edit = chat.button("Edit and send again", chat.questions.first)
    edit.click()
    field = chat.page.get_by_role("textbox", name="Edit message")
    expect(field).to_be_focused()
    expect(field).to_have_value("Question 1")
    field.fill("changed my mind")
    field.press("Escape")  # nothing happens
    expect(chat.questions.first.locator(".body")).to_have_text("Question 1")
    expect(edit).to_be_focused()
    edit.click()
    stub.script("New answer.")
    field.fill("Question A\nsecond line")
    chat.button("Send", chat.questions.first).click()
    expect(chat.answer).to_have_text("New answer.")
    expect(chat.questions).to_have_count(1)
    assert sent(stub) == [("user", "Question A\nsecond line")]
    expect(chat.titles).to_have_text(["Question A"])
    chat.done()
    chat.button("Undo").click()
    expect(chat.questions.locator(".body")).to_have_text(["Question 1", "Question 2"])
    chat.input.press("ArrowUp")  # edits the last message
    field.fill("Question B")
    field.press("Enter")
    expect(chat.questions.locator(".body")).to_have_text(["Question 1", "Question B"])
    chat.done()
    assert sent(stub)[-1] == ("user", "Question B")


# --- several chats --------------------------------------------------------------------------------------------------


def test_chats_are_saved_apart_and_survive_a_reload(chat, stub):
    stub.script("About cats.")
    chat.talk("Cats")
    chat.button("New chat").click()
    expect(chat.answers).to_have_count(0)
    stub.script("About dogs.")
    chat.talk("Dogs")
    assert sent(stub) == [("user", "Dogs")]
    expect(chat.titles).to_have_text(["Dogs", "Cats"])
    chat.page.reload()
    expect(chat.answer).to_have_text("About dogs.")  # the one that was open
    chat.titles.nth(1).click()
    expect(chat.answer).to_have_text("About cats.")
    assert chat.page.title() == "Cats · nanochat"


def test_an_answer_goes_on_while_another_chat_is_open(chat, stub):
    gate = Gate()
    stub.script("Slow", gate, " but sure.")
    chat.ask("Tortoise")
    expect(chat.answer).to_have_text("Slow")
    chat.page.keyboard.press("Control+Shift+O")
    expect(chat.answers).to_have_count(0)
    stub.script("Fast.")
    chat.talk("Hare")
    gate.open()
    expect(chat.page.locator("#chats .running")).to_have_count(0)
    expect(chat.answer).to_have_text("Fast.")
    chat.titles.filter(has_text="Tortoise").click()
    expect(chat.answer).to_have_text("Slow but sure.")


def test_rename(chat):
    chat.talk("A long first message")
    chat.button("Rename A long first message").click()
    field = chat.page.get_by_role("textbox", name="Title of the chat")
    field.fill("<b>Short</b>")
    field.press("Enter")
    expect(chat.titles).to_have_text(["<b>Short</b>"])
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("<b>Short</b>")
    chat.button("Rename <b>Short</b>").click()
    field.fill("not this")
    field.press("Escape")
    expect(chat.titles).to_have_text(["<b>Short</b>"])


def test_delete_can_be_undone(chat, stub):
    chat.talk("Keep")
    chat.button("New chat").click()
    stub.script("Soon gone.")
    chat.talk("Throw away")
    chat.button("Delete Throw away").click()
    expect(chat.titles).to_have_text(["Keep"])
    expect(chat.questions).to_have_text(["Keep"])
    assert [c["title"] for c in chat.stored()] == ["Keep"]
    chat.button("Undo").click()
    expect(chat.answer).to_have_text("Soon gone.")
    assert len(chat.stored()) == 2
    chat.button("Delete Throw away").click()
    chat.page.reload()
    expect(chat.titles).to_have_text(["Keep"])
    stub.script("On and on", Gate())
    chat.ask("Go")
    expect(chat.answer).to_have_text("On and on")
    chat.button("Delete Keep").click()  # stops it
    expect(chat.titles).to_have_count(0)
    chat.talk("Next")
    assert stub.cancelled == 1 and [c["title"] for c in chat.stored()] == ["Next"]


def test_export_and_import_give_the_same_chats(chat, stub, window, tmp_path):
    stub.script(Tool("34+27", "61"), "It is 61. <i>&amp;")
    chat.talk("What is 34 + 27?")
    chat.button("New chat").click()
    chat.talk("Second")
    with chat.page.expect_download() as download:
        chat.button("Export").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert re.fullmatch(r"nanochat-chats-\d{4}-\d\d-\d\d\.json", path.name)
    exported = json.loads(path.read_text())
    assert exported["format"] == "nanochat-chats" and exported["version"] == 1
    parts = [{"type": "python", "text": "34+27"}, {"type": "python_output", "text": "61"}]
    first = exported["chats"][1]["messages"]
    assert first[1]["content"] == [*parts, {"type": "text", "text": "It is 61. <i>&amp;"}]

    other = window().ready()
    other.page.locator("#import-file").set_input_files(path)
    expect(other.toast).to_contain_text("2 chats imported.")
    assert other.stored() == chat.stored()
    other.titles.nth(1).click()
    expect(other.answers.locator(".tool")).to_contain_text("34+27 = 61")
    other.page.locator("#import-file").set_input_files(path)  # twice
    expect(other.toast).to_contain_text("0 chats imported, 2 already here.")
    expect(other.titles).to_have_count(2)


GOOD = {"id": "a", "title": "good", "messages": [{"role": "user", "content": "x"}]}
BAD_FILES = [
    "{",  # no JSON
    [1, 2],  # of something else
    {"version": 2, "chats": []},
    {"version": 1, "chats": [GOOD, 5]},
    {"version": 1, "chats": [{"messages": {}}]},
    {"version": 1, "chats": [GOOD, {"messages": [{"role": "root", "content": ""}]}]},
    {"version": 1, "chats": [{"messages": [*GOOD["messages"], {"role": "assistant", "content": 7}]}]},
    {"version": 1, "chats": [{"messages": [{"role": "assistant", "content": [{"type": "image", "text": "x"}]}]}]},
]


def test_a_bad_file_is_refused_whole_and_of_a_good_one_only_known_fields_are_taken(chat):
    def give(data) -> None:
        if isinstance(data, dict):
            data = {"format": "nanochat-chats", **data}
        text = data if isinstance(data, str) else json.dumps(data)
        file = {"name": "chats.json", "mimeType": "application/json", "buffer": text.encode()}
        chat.page.locator("#import-file").set_input_files(file)

    for data in BAD_FILES:
        give(data)
        expect(chat.toast).to_contain_text("Nothing was imported")
        assert chat.stored() == []
        chat.page.evaluate("document.querySelector('#toast span').textContent = ''")
    messages = [
        {"role": "user", "content": "hi", "x": 1},
        {"role": "assistant", "content": "ho", "rate": "fast", "end": "boom", "prompt_tokens": -3},
    ]
    odd = {"id": "../<script>", "title": 5, "evil": {"a": 1}, "updated": "soon", "messages": messages}
    give({"version": 1, "chats": [odd]})
    expect(chat.titles).to_have_text(["New chat"])
    (kept,) = chat.stored()
    assert re.fullmatch(r"[a-z0-9]+", kept["id"]) and "evil" not in kept
    assert kept["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_two_tabs_see_each_others_chats(chat):
    other = chat.tab()
    chat.talk("From the first tab")
    expect(other.locator("#chats .open")).to_have_text(["From the first tab"])
    other.locator("#chats .open").click()
    expect(other.locator(".turn.assistant .body")).to_have_text("An answer.")
    chat.talk("More")
    expect(other.locator(".turn.assistant .body")).to_have_count(2)


def test_damaged_and_full_storage_hurt_nothing(chat, stub):
    chat.talk("Fine")
    chat.page.evaluate("""() => {
        localStorage.setItem("nanochat.chat.bad", "{not json");
        localStorage.setItem("nanochat.chat.worse", '{"messages": 5}');
        localStorage.setItem("nanochat.settings", '{"temperature": "hot", "top_k": 7}');
        localStorage.setItem("nanochat.theme", '"pink"');
    }""")
    chat.page.reload()
    expect(chat.titles).to_have_text(["Fine"])
    chat.ask("/topk")
    expect(chat.console.last).to_contain_text("7")
    chat.ask("/temperature")
    expect(chat.console.last).to_contain_text("0.8")
    chat.page.evaluate("localStorage.setItem('other', 'x'.repeat(5 * 1024 * 1024 - 2000))")
    chat.talk("A message that finds no room. " * 99)
    expect(chat.toast).to_be_visible()
    chat.talk("And another")
    assert len(sent(stub)) == 5


# --- commands and settings ------------------------------------------------------------------------------------------

COMMANDS = [
    ("/temperature", "0.8"),
    ("/temperature 0.3", "0.3"),
    ("/Temperature 0", "0"),
    ("/temperature 2.1", "between 0.0 and 2.0"),
    ("/temperature hot", "between 0.0 and 2.0"),
    ("/topk", "50"),
    ("/topk 10", "10"),
    ("/topk", "10"),
    ("/topk 0", "between 1 and 200"),
    ("/topk 2.5", "between 1 and 200"),
    ("/topp 0.9", "0.9"),
    ("/maxtokens 100", "100"),
    ("/maxtokens 0", "between 1 and 4096"),
    ("/seed", "random"),
    ("/seed 42", "42"),
    ("/seed random", "random"),
    ("/nonsense", "/help"),
]


def test_commands_answer_and_are_never_sent_and_other_slashes_are(chat, stub):
    for number, (command, words) in enumerate(COMMANDS, 1):
        chat.ask(command)
        expect(chat.console).to_have_count(number)
        expect(chat.console.last).to_contain_text(words)
        expect(chat.input).to_have_value("")
    chat.ask("/help")
    text = chat.console.last.inner_text()
    assert all(f"/{name} - " in text for name in ("temperature", "topk", "clear", "help"))
    assert stub.requests == [] and chat.stored() == []
    chat.talk("/usr/bin is a folder")
    chat.talk(" /help")
    assert [text for _, text in sent(stub)][::2] == ["/usr/bin is a folder", "/help"]
    chat.ask("/clear")
    expect(chat.answers).to_have_count(0)
    chat.talk("New")
    assert sent(stub) == [("user", "New")]
    expect(chat.titles).to_have_text(["New", "/usr/bin is a folder"])


def test_what_is_set_is_sent_and_kept(chat, stub):
    chat.talk("Before")
    assert {k: stub.requests[-1][k] for k in ("temperature", "top_k", "top_p", "max_tokens")} == {
        "temperature": 0.8, "top_k": 50, "top_p": 1, "max_tokens": 512,
    }  # fmt: skip
    assert "seed" not in stub.requests[-1] and "truncate_history" not in stub.requests[-1]
    chat.button("Settings").click()
    panel = chat.page.get_by_role("complementary", name="Settings")
    expect(panel.get_by_label("Temperature", exact=True)).to_be_focused()
    panel.get_by_label("Temperature", exact=True).fill("0.25")
    panel.get_by_label("Top-k, slider").fill("20")
    panel.get_by_label("Top-p", exact=True).fill("0.5")
    panel.get_by_label("Longest answer").fill("64")
    panel.get_by_label("Seed").fill("7")
    panel.get_by_label("Leave out the oldest turns when the context is full").check()
    expect(panel.get_by_label("Top-k", exact=True)).to_have_value("20")
    chat.page.reload()
    chat.ready()
    chat.talk("After")
    wanted = {"temperature": 0.25, "top_k": 20, "top_p": 0.5, "max_tokens": 64, "seed": 7, "truncate_history": True}
    assert wanted.items() <= stub.requests[-1].items()
    chat.button("Settings").click()
    chat.button("Back to defaults").click()
    chat.talk("Default")
    assert stub.requests[-1]["temperature"] == 0.8 and "seed" not in stub.requests[-1]


def test_a_wrong_setting_is_not_taken_and_the_servers_defaults_hold_until_something_is_set(chat, stub):
    chat.button("Settings").click()
    field = chat.page.get_by_label("Temperature", exact=True)
    field.fill("3")
    field.press("Enter")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(chat.page.locator("#settings").get_by_role("alert")).to_contain_text("between 0.0 and 2.0")
    chat.talk("x")
    assert stub.requests[-1]["temperature"] == 0.8
    field.fill("0.8")
    field.press("Enter")
    expect(field).to_have_attribute("aria-invalid", "false")
    chat.button("Close settings").click()
    expect(chat.button("Settings")).to_be_focused()
    chat.page.evaluate("localStorage.clear()")
    stub.model["defaults"] = {"temperature": 0.1, "top_k": 5, "max_tokens": 32}
    chat.page.reload()
    chat.ready()
    chat.ask("/topk 9")
    chat.talk("x")
    assert {"temperature": 0.1, "top_k": 9, "max_tokens": 32}.items() <= stub.requests[-1].items()


# --- tools, figures -------------------------------------------------------------------------------------------------


def test_tool_calls_are_small_blocks_that_unfold(chat, stub):
    gate = Gate()
    stub.script("Let me see. ", Tool("34+27", "61"), gate, "That is **61**. ", Tool("1/0", None), "No result.")
    chat.ask("What is 34 + 27?")
    block = chat.answers.last.locator("details.tool")
    expect(block).to_have_count(1)
    expect(block.locator("summary")).to_contain_text("Calculator")
    expect(block.locator("summary code")).to_have_text("34+27 = 61")
    expect(block.locator("dl")).to_be_hidden()
    block.locator("summary").focus()
    chat.page.keyboard.press("Enter")
    expect(block.locator("dd")).to_have_text(["34+27", "61"])
    gate.open()
    chat.done()
    expect(block).to_have_count(2)
    expect(block.first.locator("dl")).to_be_visible()  # stayed open while the answer went on
    expect(block.last.locator("summary code")).to_have_text("1/0")
    expect(chat.answer.locator("strong")).to_have_text("61")
    assert chat.answer.locator(".prose").all_inner_texts() == ["Let me see.", "That is 61.", "No result."]
    chat.talk("Thanks")
    assert stub.requests[-1]["messages"][1]["content"] == [
        {"type": "text", "text": "Let me see. "},
        {"type": "python", "text": "34+27"},
        {"type": "python_output", "text": "61"},
        {"type": "text", "text": "That is **61**. "},
        {"type": "python", "text": "1/0"},
        {"type": "text", "text": "No result."},
    ]


def test_context_meter_and_tokens_per_second(chat, stub):
    meter = chat.page.get_by_role("meter", name="Context used")
    expect(meter).to_have_text("0 of 256 tokens")
    gate = Gate()
    stub.script("a", gate, "b")
    chat.ask("x")
    expect(chat.answer).to_have_text("a")
    chat.page.wait_for_timeout(200)
    gate.open()
    chat.done()
    expect(meter).to_have_text("60 of 256 tokens")
    expect(meter).to_have_attribute("aria-valuenow", "60")
    expect(meter).not_to_have_class("high")
    stats = chat.answers.last.locator(".stats").inner_text()
    match = re.fullmatch(r"20 tokens · (\d+\.\d) tokens/s", stats)
    assert match and 0 < float(match[1]) <= 19 / 0.2  # 19 tokens after the first, in 0.2 s and what the machine adds
    expect(chat.answers.last.locator(".stats")).to_have_attribute("title", re.compile(r"First token after \d\.\d\d s"))
    stub.usage = {"prompt_tokens": 230, "completion_tokens": 4}
    chat.talk("y")
    expect(meter).to_have_text("234 of 256 tokens")
    expect(meter).to_have_class("high")
    stub.finish_reason = "length"
    chat.talk("z")
    expect(chat.note).to_be_visible()
    words = chat.note.inner_text()
    stub.usage = {"prompt_tokens": 240, "completion_tokens": 16}
    chat.talk("z")
    expect(chat.note).to_contain_text("context")  # it is full, which is another matter than the longest length
    assert "context" not in words
    chat.button("New chat").click()
    expect(meter).to_have_text("0 of 256 tokens")


def test_an_overlong_conversation_offers_to_leave_out_old_turns(chat, stub):
    chat.talk("Old")
    words = "too many tokens"
    stub.script(Fail(400, words, "context_length_exceeded"))
    chat.talk("New")
    expect(chat.note).to_contain_text(words[1:])
    chat.button("Leave out the oldest turns").click()
    expect(chat.answer).to_have_text("An answer.")
    assert stub.requests[-1]["truncate_history"] is True
    assert sent(stub) == [("user", "Old"), ("assistant", "An answer."), ("user", "New")]


def test_a_base_model_gets_a_page_that_continues_text(chat, stub):
    stub.model |= {"stage": "base", "chat": False}
    chat.page.reload()
    chat.ready()
    expect(chat.page.locator("#model")).to_have_text("tiny-sft · base model")
    expect(chat.page.get_by_role("heading", name="tiny-sft continues what you write")).to_be_visible()
    expect(chat.input).to_have_attribute("placeholder", "Write the start of a text")
    stub.script(" there was **a** king")
    chat.ask("Once upon a time")
    passage = chat.page.locator(".turn.passage")
    expect(passage.locator(".body")).to_have_text("Once upon a time there was **a** king")
    chat.done()
    assert stub.requests[-1]["prompt"] == "Once upon a time" and "messages" not in stub.requests[-1]
    stub.script(" who could not sleep.")
    chat.button("Continue the text").click()
    expect(passage.locator(".body")).to_have_text("Once upon a time there was **a** king who could not sleep.")
    chat.done()
    assert stub.requests[-1]["prompt"] == "Once upon a time there was **a** king"
    stub.script(" lived a fox.")
    chat.button("Regenerate").click()
    expect(passage.locator(".body")).to_have_text("Once upon a time lived a fox.")
    chat.done()
    stub.script(" blue.")
    chat.ask("The sea is")  # a text of its own
    expect(passage.last.locator(".body")).to_have_text("The sea is blue.")
    assert stub.requests[-1]["prompt"] == "The sea is"
    chat.done()
    chat.page.reload()
    expect(passage.locator(".body")).to_have_text(["Once upon a time lived a fox.", "The sea is blue."])
    stub.script(" was a hill.")
    passage.first.hover()
    chat.button("Edit and send again", passage.first).click()
    chat.page.get_by_role("textbox", name="Edit message").fill("There")
    chat.page.keyboard.press("Enter")  # leaves the other text alone
    expect(passage.locator(".body")).to_have_text(["There was a hill.", "The sea is blue."])
    chat.done()
    assert stub.requests[-1]["prompt"] == "There"
    stub.script(" red", Gate())
    chat.button("Regenerate", passage.last).click()
    expect(passage.last.locator(".body")).to_have_text("The sea is red")
    chat.button("Undo").click()  # while it is still written
    expect(passage.locator(".body")).to_have_text(["There was a hill.", "The sea is blue."])
    chat.done()
