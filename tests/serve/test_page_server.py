"""The chat page when the server misbehaves, goes away and comes back; and together with the real server."""

import time

import pytest
from playwright.sync_api import expect

from tests.page_browser import Chat
from tests.serve_fixtures import BASE, serving, toy_engine
from tests.tokenizer_fixtures import golden_tokenizer
from tests.web_server import Die, Fail, Gate, PageServer

pytest_plugins = ["tests.page_browser"]

BACK = "The server is back."
GONE = "The server does not answer."
BROKEN_OFF = "The connection to the server broke off here. What had arrived is kept."


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_is_told_in_the_servers_words_and_can_be_tried_again(chat, stub):
    stub.script(Fail(400, "messages.0: <b>too odd</b>"))
    chat.talk("Odd")
    expect(chat.note).to_contain_text("Messages.0: <b>too odd</b>.")
    chat.button("Try again").click()
    expect(chat.answer).to_have_text("An answer.")
    chat.done()
    expect(chat.answers).to_have_count(1)
    stub.script(Fail(500, ""))
    chat.talk("More")
    expect(chat.note).to_contain_text("The server reported an error.")


def test_an_error_in_the_middle_keeps_what_came(chat, stub):
    stub.script("Half an ", Fail(0, "the model stopped working", "worker_failed"))
    chat.talk("Go")
    expect(chat.answer).to_have_text("Half an")
    expect(chat.note).to_contain_text("The model stopped working.")
    stub.script("Half an ", Fail(0, "the server is shutting down", "shutting_down"))
    chat.talk("Go")
    expect(chat.note).to_contain_text("The server was stopped here. What had arrived is kept.")


@pytest.mark.parametrize("came", ["Half an ", ""])
def test_a_connection_that_breaks_off_keeps_what_came(chat, stub, came):
    gate = Gate()
    stub.script(came, gate, Die())
    chat.ask("Go")
    expect(chat.answer).to_have_text(came.strip())
    gate.open()
    chat.done()
    expect(chat.answer).to_have_text(came.strip())
    expect(chat.note).to_contain_text(BROKEN_OFF if came else "The server does not answer. Your message is kept.")
    assert chat.stored()[0]["messages"][1]["end"] == "lost"
    expect(chat.banner).to_be_hidden()  # the server itself is well
    chat.talk("Next")
    expect(chat.answer).to_have_text("An answer.")


def test_a_full_queue_is_waited_for(chat, stub):
    stub.script(Fail(429, "all slots are busy", "queue_full", {"Retry-After": "1"}))
    chat.ask("Go")
    expect(chat.note).to_have_text("The server is busy. Next try in 1 s.")
    expect(chat.answer).to_have_text("An answer.")
    chat.done()
    assert len(stub.requests) == 2
    stub.script(Fail(429, "all slots are busy", "queue_full", {"Retry-After": "30"}))
    chat.ask("Again")
    expect(chat.note).to_have_text("The server is busy. Next try in 30 s.")
    chat.button("Stop").click()
    expect(chat.note).to_have_text("Stopped.")
    assert len(stub.requests) == 3


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(chat, stub):
    stub.script("Half an ", Gate())
    chat.ask("Go")
    expect(chat.answer).to_have_text("Half an")
    chat.page.reload()
    expect(chat.answer).to_have_text("Half an")
    expect(chat.note).to_contain_text("The page was closed before this answer was complete.")
    chat.button("Try again").click()
    expect(chat.answer).to_have_text("An answer.")


# --- the API key ------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_kept_for_the_tab(window, stub):
    stub.api_key = "right"
    chat = window()
    dialog = chat.page.get_by_role("dialog", name="This server asks for a key")
    field = dialog.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("wrong")
    field.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("The server did not accept this key.")
    field.fill("right")
    chat.button("Continue").click()
    chat.ready()
    chat.talk("Hello")
    chat.page.reload()
    chat.ready()
    expect(dialog).to_be_hidden()
    assert chat.page.evaluate("[JSON.stringify(localStorage).includes('right'), sessionStorage['nanochat.key']]") == [
        False,
        "right",
    ]


def test_a_key_that_is_changed_meanwhile_does_not_lose_the_question(chat, stub):
    stub.api_key = "new"
    chat.ask("Hello")
    dialog = chat.page.get_by_role("dialog")
    dialog.get_by_label("API key").press("Escape")
    expect(chat.note).to_contain_text("The server needs an API key.")
    chat.button("Try again").click()
    dialog.get_by_label("API key").fill("new")
    dialog.get_by_label("API key").press("Enter")
    expect(chat.answer).to_have_text("An answer.")


# --- away and back ----------------------------------------------------------------------------------------------------


@pytest.fixture
def talking(stub, browser):
    """A chat in the middle of an answer of a server of its own: (chat, server)."""
    server = PageServer()
    server.script("0 1 2 3", Gate())
    chat = Chat(browser, server.url).ready()
    chat.page.evaluate("window.marker = 'not reloaded'")
    chat.ask("Count")
    expect(chat.answer).to_contain_text("0 1 2 3")
    yield chat, server
    chat.close()
    server.close()


def test_a_server_killed_in_the_middle_of_an_answer_and_started_again(talking):
    chat, server = talking
    server.close()
    expect(chat.note).to_contain_text(BROKEN_OFF)
    expect(chat.answer).to_contain_text("0 1 2 3")
    expect(chat.banner).to_contain_text(GONE)
    expect(chat.page.locator("#countdown")).to_be_visible()
    expect(chat.page.locator("#model")).to_have_text("not connected")
    expect(chat.input).to_be_enabled()
    expect(chat.button("Stop")).to_be_hidden()
    chat.ask("Is anybody there?")
    expect(chat.note).to_contain_text("The server does not answer. Your message is kept.")
    again = PageServer(server.port)
    expect(chat.banner).to_contain_text(BACK, timeout=20000)
    expect(chat.page.locator("#model")).to_have_text("tiny-sft")
    chat.button("Try again", chat.answers.last).click()
    expect(chat.answer).to_have_text("An answer.")
    expect(chat.banner).to_be_hidden()
    assert chat.page.evaluate("window.marker") == "not reloaded"
    assert [m["role"] for m in chat.stored()[0]["messages"]] == ["user", "assistant"] * 2
    again.close()


@pytest.mark.slow
def test_a_server_that_falls_silent_is_noticed(talking):
    chat, server = talking
    server.answering.clear()
    chat.page.evaluate("dispatchEvent(new Event('online'))")  # looks at once, not in up to ten seconds
    expect(chat.banner).to_contain_text(GONE, timeout=10000)
    expect(chat.note).to_contain_text(BROKEN_OFF, timeout=20000)
    server.answering.set()
    expect(chat.banner).to_contain_text(BACK, timeout=20000)


def test_looks_grow_rarer_while_the_server_is_away(window, stub):
    chat = window().ready()
    chat.page.clock.install()
    tries = []
    chat.page.on("request", lambda request: tries.append(request.url) if request.url.endswith("/health") else None)
    stub.health = 503
    chat.page.evaluate("dispatchEvent(new Event('online'))")
    expect(chat.banner).to_contain_text("The server is there, but its model is not working.")
    for wait in (1, 2, 4, 8, 15, 15):
        n = len(tries)
        expect(chat.page.locator("#countdown")).to_have_text(f"Next try in {wait} s.")
        chat.page.clock.run_for((wait - 1) * 1000)
        assert len(tries) == n
        with chat.page.expect_response("**/health"):
            chat.page.clock.run_for(1000)
        assert len(tries) == n + 1
    stub.health = 200
    chat.button("Try now").click()
    expect(chat.banner).to_contain_text(BACK)


def test_a_server_that_warms_up_is_shown_and_asked(window, stub):
    stub.warmed_up = 0.25
    chat = window()
    model = chat.page.locator("#model")
    expect(model).to_have_text("warming up, 25 %")
    expect(chat.banner).to_contain_text("The server is warming up.")
    expect(chat.page.get_by_role("button", name="Who are you?")).to_be_visible()
    gate = Gate()
    stub.script(gate, "Here I am.")
    chat.ask("Hello")
    stub.warmed_up = 0.999
    expect(model).to_have_text("warming up, 99 %")
    stub.warmed_up = 1.0
    chat.ready()
    expect(chat.banner).to_be_hidden()
    gate.open()
    chat.done()
    expect(chat.answer).to_have_text("Here I am.")


def test_another_model_after_a_restart_is_noticed(chat, stub):
    stub.model |= {"step": 400, "context_length": 512}
    chat.page.evaluate("dispatchEvent(new Event('online'))")
    expect(chat.page.get_by_role("meter")).to_have_text("0 of 512 tokens")
    expect(chat.page.locator("#model")).to_have_attribute("title", "sft, step 400")


# --- the real server --------------------------------------------------------------------------------------------------


@pytest.fixture
def visit(browser):
    opened = []

    def visit(running) -> Chat:
        opened.append(Chat(browser, running.url))
        return opened[-1]

    yield visit
    for chat in opened:
        chat.close()


def tool_answer(*parts: str) -> list[int]:
    """Token ids of text and, where a part is in angle brackets, of a call of the calculator."""
    tokenizer = golden_tokenizer()
    special, ids = tokenizer.encode_special, []
    for part in parts:
        call = part.startswith("<")
        text = tokenizer.encode_text(part.strip("<>"))
        ids += [special("<|python_start|>"), *text, special("<|python_end|>")] if call else text
    return [*ids, special("<|assistant_end|>")]


def test_with_the_real_server_tool_calls_and_history(visit):
    hi = [{"role": "user", "content": "What is 34 + 27?"}]
    with serving(toy_engine()) as running:
        chat = visit(running).ready()
        running.tell(tool_answer("So 🙂 ", "<34+27>"), hi)
        expect(chat.page.locator("#model")).to_have_text("tiny")
        chat.button("Settings").click()
        chat.page.get_by_label("Show what else the model could have said").check()
        chat.talk(hi[0]["content"])
        expect(chat.answer.locator(".prose")).to_have_text("So 🙂")
        expect(chat.answer.locator(".tool summary code")).to_have_text("34+27 = 61")
        expect(chat.answers.last.locator(".stats")).to_contain_text("tokens/s")
        tokens = chat.answers.last.locator(".tokens span")
        assert tokens.count() > 3 and (tokens.first.get_attribute("title") or "").count(" %  ") == 5
        (kept,) = chat.stored()
        content = kept["messages"][1]["content"]
        assert content[-2:] == [{"type": "python", "text": "34+27"}, {"type": "python_output", "text": "61"}]
        answer = kept["messages"][1]
        used = answer["prompt_tokens"] + answer["completion_tokens"]
        expect(chat.page.get_by_role("meter")).to_have_text(f"{used} of {running.worker.engine.capacity} tokens")
        thanks = {"role": "user", "content": "Thanks"}
        running.tell(tool_answer("<1/0>", "You are welcome."), [*hi, {"role": "assistant", "content": content}, thanks])
        chat.talk("Thanks")  # takes the parts back: the prompt is as long as the script expects
        expect(chat.answer.locator(".prose")).to_have_text("You are welcome.")
        expect(chat.answer.locator(".tool summary code")).to_have_text("1/0")
        running.idle()


@pytest.mark.slow
def test_with_the_real_server_base_model_and_key(visit):
    with serving(toy_engine(), BASE, key="secret") as running:
        chat = visit(running)
        chat.page.get_by_label("API key").fill("secret")
        chat.page.get_by_label("API key").press("Enter")
        chat.ready()
        chat.ask("/maxtokens 20")
        chat.ask("Once upon a time")
        made = chat.page.locator(".passage .made")
        chat.done()
        before = made.text_content()
        assert before
        chat.button("Continue the text").click()
        chat.done()
        assert made.text_content().startswith(before) and len(made.text_content()) > len(before)
        running.idle()


def test_with_the_real_server_stop_frees_the_slot(visit):
    engine = toy_engine()
    running_on, budget = engine.step, [4]

    def step(meanwhile, steps):
        """A few calls, then nothing comes until the request is cancelled: the button may take as long as it likes."""
        if not budget[0] and engine.live:
            meanwhile()
            time.sleep(0.01)
            return []
        budget[0] = max(0, budget[0] - 1)
        return running_on(meanwhile, steps)

    engine.step = step
    with serving(engine) as running:
        chat = visit(running).ready()
        running.tell(tool_answer("la " * 50), [{"role": "user", "content": "Sing"}])
        chat.ask("Sing")
        expect(chat.answer).to_contain_text("la la")
        chat.button("Stop").click()
        expect(chat.note).to_have_text("Stopped.")
        running.idle()
        content = chat.stored()[0]["messages"][1]["content"]
        assert ("la " * 50).startswith(content) and 6 <= len(content) < 150
