"""A real headless Chromium for the tests of the chat page, and fixtures: `stub` (the scripted server) and `chat`.

The environment variable CHROMIUM names the browser; without it, the usual names are looked for.
"""

import os
import shutil
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.web_server import PageServer

expect.set_options(timeout=20000)


@pytest.fixture(scope="module")  # Playwright holds an event loop: later modules want the thread without one
def browser():
    path = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
    )
    if path is None:
        pytest.skip("the chat page is tested in Chromium, which is not here: install it, or name it with CHROMIUM=PATH")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to sandbox for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


class Chat:
    """The page in a window of its own: the things a person does and sees."""

    def __init__(self, browser: Browser, url: str, **window):
        self.url = url
        self.context: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **window})
        self.problems: list[str] = []
        self.page = self.tab()

    def tab(self) -> Page:
        """Another tab, loaded and ready."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("console", lambda m: self.problems.append(m.text) if "Content Security Policy" in m.text else None)
        page.on(
            "request", lambda r: None if r.url.startswith((self.url, "blob:", "data:")) else self.problems.append(r.url)
        )
        page.goto(self.url)
        return page

    def close(self) -> None:
        self.context.close()
        assert not self.problems  # no uncaught error, nothing that the policy had to block, no request elsewhere

    # -- doing

    def ready(self) -> "Chat":
        expect(self.page.locator("#model")).to_have_attribute("data-state", "ready")
        return self

    def ask(self, text: str) -> None:
        self.input.fill(text)
        self.input.press("Enter")

    def talk(self, text: str) -> None:
        """Asks, and waits for the end of the answer."""
        n = self.answers.count()
        self.ask(text)
        expect(self.answers).to_have_count(n + 1)
        self.done()

    def done(self) -> None:
        expect(self.page.locator("#log")).to_have_attribute("aria-busy", "false")

    def button(self, name: str, within: Locator | None = None) -> Locator:
        return (within or self.page).get_by_role("button", name=name, exact=True)

    # -- seeing

    @property
    def input(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def questions(self) -> Locator:
        return self.page.get_by_role("article", name="You")

    @property
    def answers(self) -> Locator:
        return self.page.get_by_role("article", name="Answer")

    @property
    def answer(self) -> Locator:
        """What the newest answer says, without buttons and notes."""
        return self.answers.last.locator(".body")

    @property
    def note(self) -> Locator:
        return self.answers.last.locator(".note")

    @property
    def console(self) -> Locator:
        """What the page itself says among the messages."""
        return self.page.locator(".console")

    @property
    def toast(self) -> Locator:
        return self.page.locator("#toast")

    @property
    def banner(self) -> Locator:
        return self.page.locator("#banner")

    @property
    def titles(self) -> Locator:
        return self.page.get_by_role("list", name="Saved chats").locator(".open")

    def stored(self) -> list[dict[str, Any]]:
        """The chats in the browser's storage, the oldest first."""
        chats = self.page.evaluate(
            """Object.entries(localStorage).filter(([key]) => key.startsWith("nanochat.chat."))
                .map(([, value]) => JSON.parse(value))"""
        )
        return sorted(chats, key=lambda chat: chat["created"])


@pytest.fixture(scope="module")
def shared_stub():
    server = PageServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def shared_chat(browser, shared_stub):
    chat = Chat(browser, shared_stub.url)
    yield chat
    chat.close()


@pytest.fixture
def stub(shared_stub):
    """The scripted server, as new."""
    shared_stub.reset()
    return shared_stub


@pytest.fixture
def chat(shared_chat, shared_stub):
    """The page, on its first visit: storage is emptied, the document is loaded anew. (A new window takes a second.)"""
    page = shared_chat.page
    page.goto("about:blank")
    shared_stub.reset()
    page.goto(f"{shared_stub.url}/health")
    page.evaluate("localStorage.clear(); sessionStorage.clear()")
    page.goto(shared_stub.url)
    yield shared_chat.ready()
    for other in shared_chat.context.pages[1:]:
        other.close()
    problems, shared_chat.problems = shared_chat.problems, []
    assert not problems


@pytest.fixture
def window(browser, stub):
    """Opens another window on the stub, as another person would have: ``window(color_scheme="dark")``."""
    opened = []

    def open_window(**options) -> Chat:
        opened.append(Chat(browser, stub.url, **options))
        return opened[-1]

    yield open_window
    for chat in opened:
        chat.close()
