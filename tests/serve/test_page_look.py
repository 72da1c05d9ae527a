"""The chat page in a real Chromium: Markdown and hostile text, themes, phones, keyboard, screen readers."""

import random
import re
import time

import pytest
from playwright.sync_api import expect

from tests.web_server import Gate, Tool

pytest_plugins = ["tests.page_browser"]


def markdown(chat, text: str) -> str:
    """The HTML of a text, as the page's own renderer builds it."""
    return chat.page.evaluate(
        "(text) => { const box = document.createElement('div'); renderMarkdown(box, text); return box.innerHTML; }",
        text,
    )


# --- Markdown ---------------------------------------------------------------------------------------------------------

LINK = '<a href="https://a.org/" target="_blank" rel="noopener noreferrer">{}</a>'
RENDERED = [
    ("plain", "<p>plain</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    (
        "**bold** *it* __b__ _i_ ~~no~~",
        "<p><strong>bold</strong> <em>it</em> <strong>b</strong> <em>i</em> <s>no</s></p>",
    ),
    ("***both*** **a *b* c**", "<p><strong><em>both</em></strong> <strong>a <em>b</em> c</strong></p>"),
    ("2 * 3 * 4 and a_b_c and ** x **", "<p>2 * 3 * 4 and a_b_c and ** x **</p>"),
    ("**never closed", "<p>**never closed</p>"),
    (r"\*not\* 1\. \\", "<p>*not* 1. \\</p>"),
    ("`a **b** <i>` and ``x`y``", "<p><code>a **b** &lt;i&gt;</code> and <code>x`y</code></p>"),
    ("# One\n### Three ###\n####### no", "<h1>One</h1><h3>Three</h3><p>####### no</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("2. a\n3. b\n\ntext", '<ol start="2"><li>a</li><li>b</li></ol><p>text</p>'),
    ("Steps:\n1. a\n2. b", "<p>Steps:</p><ol><li>a</li><li>b</li></ol>"),
    ("Born in\n1905. He", "<p>Born in<br>1905. He</p>"),
    ("- a\n\n  b\n- c", "<ul><li><p>a</p><p>b</p></li><li>c</li></ul>"),
    ("> q\n> - a", "<blockquote><p>q</p><ul><li>a</li></ul></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("[x](https://a.org/)", f"<p>{LINK.format('x')}</p>"),
    ("[**x**](https://a.org/).", f"<p>{LINK.format('**x**')}.</p>"),
    ("see https://a.org/.", f"<p>see {LINK.format('https://a.org/')}.</p>"),
    ("h https:// xhttps://a.org", "<p>h https:// xhttps://a.org</p>"),
    ("![alt](https://a.org/)", f"<p>!{LINK.format('alt')}</p>"),
    (
        "| a | b |\n|---|:-:|\n| 1 | *2* |",
        '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td><em>2</em></td></tr></tbody></table></div>",
    ),
]


def test_markdown(chat):
    for text, html in RENDERED:
        assert markdown(chat, text) == html, text


NODES = """(selector) => {
    const all = [...document.querySelectorAll(`${selector} *`)];
    return [all.map((e) => e.localName), all.flatMap((e) => e.getAttributeNames())];
}"""
TAGS = set(
    "article div span p br h1 h2 h3 h4 h5 h6 hr ul ol li blockquote em strong s code pre a header button table thead "
    "tbody tr th td svg use".split()
)
ATTRIBUTES = set("class href target rel start type title tabindex aria-label aria-hidden".split())

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "**<svg/onload=alert(1)>**",
    "[x](javascript:alert(1))",
    "[x]( JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) [x](file:///etc/passwd) [x](//evil.org) [x](/v1/models)",
    '[x](https://a.org/"onmouseover="alert(1))',
    "![x](https://evil.org/pixel.png)",
    "```<script>\n</code></pre><script>alert(1)</script>\n```",
    "# <iframe src=//evil.org>",
    "- <a href=javascript:alert(1)>x</a>",
    "| <b>a</b> | b |\n|---|---|\n| <script>1</script> | \\| |",
    "&lt;script&gt; &amp; &#60;",
    "\u202e\u0000<x>\ufeff.",
]


def test_text_is_never_html(chat, stub):
    dialogs = []
    chat.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    texts = ["\n\n".join(HOSTILE[i::4]) for i in range(4)]
    for text in texts:
        stub.script(text)
        chat.talk(text)  # the same text as a question, a title and an answer
        chat.button("New chat").click()
    for item in chat.titles.all():
        item.click()
        elements, attributes = chat.page.evaluate(NODES, "#log")
        assert set(elements) <= TAGS and set(attributes) <= ATTRIBUTES
        links = chat.page.evaluate("[...document.querySelectorAll('#log a')].map((a) => [a.protocol, a.rel])")
        assert all(protocol in ("http:", "https:") and rel == "noopener noreferrer" for protocol, rel in links)
    assert dialogs == []
    kept = {m["content"] for c in chat.stored() for m in c["messages"]}
    assert kept == {*texts, *(text.strip() for text in texts)}


PIECES = [
    "\n", "\n\n", "# ", "- ", "  - ", "1. ", "> ", "```py\n", "```", "`", "**", "*", "_", "__", "~~", "[a](", "](",
    "https://a.b/c", ")", "!", "\\", "word", "<b>", "&", "  ", "1", "日本", "🙂", "---", "a_b", "|", "| a |\n|---|\n",
]  # fmt: skip


def test_any_text_gives_safe_nodes_and_growing_text_gives_the_same(chat):
    generator = random.Random(7)
    texts = ["".join(generator.choices(PIECES, k=generator.randint(1, 40))) for _ in range(400)]
    whole = [markdown(chat, text) for text in texts[:100]]
    pieces = chat.page.evaluate(
        """(texts) => texts.map((text) => {
            const box = document.createElement("div");
            for (let end = 1; end < text.length; end += 3) renderMarkdown(box, text.slice(0, end));
            renderMarkdown(box, text);
            return box.innerHTML;
        })""",
        texts,
    )
    assert pieces[:100] == whole
    chat.page.evaluate(
        """(texts) => texts.forEach((text) => {
            const box = document.createElement("div");
            renderMarkdown(box, text);
            document.querySelector("#log").append(box);
        })""",
        texts,
    )
    elements, attributes = chat.page.evaluate(NODES, "#log > div")
    assert set(elements) <= TAGS and set(attributes) <= ATTRIBUTES


HARD = [
    "*a " * 30000, "[" * 50000, "`" * 20000 + "a", "**a_" * 20000, "> " * 5000 + "x", "- " * 5000 + "x", "a" * 300000,
    "(https://a.b/" * 8000, "| - " * 20000 + "\n" + "|-" * 20000 + "x", "\\" * 50000, "1. a\n\n" * 5000,
]  # fmt: skip


def test_hard_text_does_not_hang_the_page(chat):
    for text in HARD:
        start = time.monotonic()
        markdown(chat, text)
        assert time.monotonic() - start < 5, text[:20]


def test_code_blocks_have_a_copy_button(window, stub):
    chat = window().ready()
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "def f(x):\n\treturn x < 1  # <b>"
    gate = Gate()
    stub.script(f"Look:\n\n```python\n{code}", gate, "\n```\nDone.")
    chat.ask("Code")
    block = chat.answer.locator(".code")
    expect(block.locator("code")).to_contain_text("return x < 1")  # before the block is closed
    gate.open()
    chat.done()
    expect(block.locator("header span")).to_have_text("python")
    chat.button("Copy code").click()
    expect(chat.button("Copy code")).to_have_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == code.replace("\t", "    ")
    chat.button("Copy answer").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == f"Look:\n\n```python\n{code}\n```\nDone."
    chat.questions.last.hover()
    chat.button("Copy message").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "Code"


# --- light and dark, phones -------------------------------------------------------------------------------------------

CONTRAST = """(selectors) => {
    const parse = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => {
        const [r, g, b] = rgb.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return selectors.map((selector) => {
        const element = document.querySelector(selector);
        let behind = element;
        while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
        const colors = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        const [a, b] = colors.map((color) => light(parse(color)));
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""
TEXTS = [
    ".turn.user .body", ".turn.assistant .prose p", ".prose code", ".code pre", ".code header span", ".prose a",
    ".hint", ".tool summary", ".tool dt", ".turn .stats", ".turn .note", ".note.bad", "#title", "#model",
    "#chats .open", "#meter", "#new-chat", ".setting .help", ".setting label", "#toast span", "#toast button", "#send",
    ".console",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_both_themes(window, stub, scheme):
    chat = window(color_scheme=scheme).ready()
    stub.script("`a` [b](https://a.org)\n\n```py\nx\n```\n", Tool("1+1", "2"))
    stub.finish_reason = "length"
    chat.talk("Question")
    stub.script(Gate())
    chat.ask("Another")
    chat.page.keyboard.press("Escape")
    chat.page.evaluate("document.querySelectorAll('.note')[1].className = 'note bad'")
    chat.button("Regenerate", chat.answers.first).click()
    chat.done()
    stub.script("`a` [b](https://a.org)\n\n```py\nx\n```\n", Tool("1+1", "2"))
    chat.talk("More")
    chat.page.evaluate("document.querySelectorAll('.note')[0].className = 'note bad'")
    chat.page.locator(".tool summary").click()
    chat.ask("/help")
    chat.button("Settings").click()
    chat.input.fill("x")
    ratios = dict(zip(TEXTS, chat.page.evaluate(CONTRAST, TEXTS), strict=True))
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_light_and_dark(window):
    chat = window(color_scheme="dark").ready()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = chat.page.evaluate(background)
    chat.page.emulate_media(color_scheme="light")
    light = chat.page.evaluate(background)
    assert dark == "rgb(25, 24, 22)" and light == "rgb(253, 252, 250)"
    chat.button("Theme: as the system. Change to light").click()
    chat.button("Theme: light. Change to dark").click()
    assert chat.page.evaluate(background) == dark
    chat.page.reload()
    assert chat.page.evaluate(background) == dark
    chat.button("Theme: dark. Change to the system's").click()
    assert chat.page.evaluate(background) == light


def test_on_a_phone(window, stub):
    phone = window(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True).ready()
    assert phone.page.evaluate("document.activeElement === document.body")  # no keyboard that pops up
    expect(phone.page.locator("#sidebar")).to_be_hidden()
    table = f"| a | b |\n|---|---|\n| {'z' * 99} | 1 |"
    stub.script(f"A long line: `{'x' * 200}`\n\n```\n{'y' * 300}\n```\n\n{table}")
    phone.input.tap()
    phone.input.fill("Hello https://example.org/" + "w" * 100)
    phone.button("Send").tap()
    phone.done()
    width = "[document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth]"
    assert phone.page.evaluate(width) == [360, 360]  # nothing scrolls sideways but code and tables themselves
    for name in ("Send", "Regenerate", "Edit and send again", "Settings"):
        expect(phone.button(name)).to_be_visible()  # without hovering
        box = phone.button(name).bounding_box()
        assert box and box["width"] >= 36 and box["height"] >= 36
    phone.button("Chats").tap()
    phone.button("New chat").tap()
    expect(phone.page.locator("#sidebar")).to_be_hidden()
    phone.button("Chats").tap()
    phone.titles.first.tap()
    expect(phone.answers).to_have_count(1)
    expect(phone.page.locator("#sidebar")).to_be_hidden()
    phone.button("Chats").tap()
    phone.page.locator("#scrim").tap(position={"x": 340, "y": 300})
    expect(phone.page.locator("#sidebar")).to_be_hidden()
    phone.button("Settings").tap()
    assert phone.page.evaluate(width)[0] == 360


WIDTHS = [1200, 390, 820, 840, 360, 1920, 600, 1200]
FRAME = """() => {
    const box = (id) => document.querySelector(id).getBoundingClientRect();
    const covers = innerWidth <= 832; // the panels lie over the page there
    const shown = (id) => getComputedStyle(document.querySelector(id)).display !== "none" && !covers;
    const left = shown("#sidebar") ? box("#sidebar").right : 0;
    const right = shown("#settings") ? box("#settings").left : innerWidth;
    const column = box("#composer");
    return [
        Math.round(box("main").left - left), Math.round(right - box("main").right),
        document.documentElement.scrollWidth - innerWidth, document.querySelector("#scroll").scrollWidth
            - document.querySelector("#scroll").clientWidth,
        Math.round(column.width - Math.min(736, right - left)),
        Math.round((column.left - left) - (right - column.right)),
        Math.round(innerHeight - column.bottom),
    ];
}"""


@pytest.mark.parametrize("talked,theme", [(False, "light"), (True, "dark")])
def test_the_page_fills_the_window_whatever_its_size(window, talked, theme):
    """No blank column, nothing cut off, the message box in the middle: after every change of the window's size, with
    and without a conversation, the panels open and closed."""
    chat = window(viewport={"width": 1200, "height": 700}, color_scheme=theme).ready()
    if talked:
        chat.talk("Hi")
    for sidebar in (True, False):
        for settings in (False, True):
            for width in WIDTHS:
                chat.page.set_viewport_size({"width": width, "height": 700})
                chat.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
                chat.page.evaluate("(shown) => showSidebar(shown)", sidebar)
                chat.page.evaluate("(shown) => { document.querySelector('#settings').hidden = !shown; }", settings)
                assert chat.page.evaluate(FRAME) == [0] * 7, (sidebar, settings, width)


# --- keyboard and screen readers --------------------------------------------------------------------------------------


def test_enter_sends_and_shift_enter_does_not(chat, stub):
    expect(chat.input).to_be_focused()
    chat.page.keyboard.type("one")
    height = chat.input.bounding_box()["height"]
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("two")
    expect(chat.input).to_have_value("one\ntwo")
    assert chat.input.bounding_box()["height"] > height
    # the Enter that ends the composition of a character (Japanese, Chinese, Korean) is no order to send
    chat.input.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert stub.requests == []
    chat.page.keyboard.press("Enter")
    chat.done()
    expect(chat.input).to_have_value("")
    assert stub.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    chat.page.keyboard.press("Enter")  # nothing to send
    chat.page.keyboard.type("  ")
    chat.page.keyboard.press("Enter")
    assert len(stub.requests) == 1


def test_typing_goes_on_while_an_answer_comes_and_progress_is_announced(chat, stub):
    said = chat.page.locator("#announce")
    gate = Gate()
    stub.script("a", gate)
    chat.ask("First")
    expect(chat.answer).to_have_text("a")
    expect(said).to_have_text("Answering")
    chat.page.keyboard.type("Second")
    chat.page.keyboard.press("Enter")  # not yet
    expect(chat.input).to_have_value("Second")
    gate.open()
    chat.done()
    expect(said).to_have_text("Answer complete")
    stub.script("a", Gate())
    chat.page.keyboard.press("Enter")
    expect(chat.answers).to_have_count(2)
    expect(chat.answer).to_have_text("a")
    chat.button("Stop").click()
    expect(said).to_have_text("Stopped")
    expect(chat.questions.locator(".body")).to_have_text(["First", "Second"])


def test_everything_can_be_reached_with_tab_and_is_seen(chat):
    chat.talk("Hello")
    chat.page.keyboard.press("Tab")  # past the end of the page: the message box is the last stop
    seen = []
    for _ in range(22):
        chat.page.keyboard.press("Tab")
        name, outline, opacity = chat.page.evaluate("""() => {
            const element = document.activeElement, style = getComputedStyle(element);
            const box = element.id === "input" && getComputedStyle(element.closest(".box"));
            const shown = box ? box.borderColor : style.outlineStyle;
            let opacity = 1;
            for (let e = element; e; e = e.parentElement) opacity *= getComputedStyle(e).opacity;
            return [element.getAttribute("aria-label") ?? element.textContent.trim(), shown, opacity];
        }""")
        assert outline not in ("none", "rgb(229, 225, 217)"), name
        assert opacity == 1, name
        seen.append(name)
        if name == "Message":
            break
    assert seen == [
        "Skip to the message box", "New chat", "Hello", "Rename Hello", "Delete Hello", "Import", "Export", "Chats",
        "Theme: as the system. Change to light", "Settings", "Conversation", "Copy message", "Edit and send again",
        "Copy answer", "Regenerate", "Message",
    ]  # fmt: skip
    chat.page.evaluate("document.querySelector('.skip').focus()")
    chat.page.keyboard.press("Enter")
    expect(chat.input).to_be_focused()


SPOKEN = [
    'navigation "Chats"', 'log "Messages"', 'article "You"', 'article "Answer"', 'meter "Context used"',
    'button "Send"', 'textbox "Message"', 'complementary "Settings"', 'slider "Temperature, slider"',
    'heading "Hello" [level=1]',
]  # fmt: skip


def test_a_screen_reader_has_a_name_for_everything(chat, stub):
    stub.script("- a\n\n```py\nx\n```\n", Tool("1+1", "2"))
    chat.talk("Hello")
    chat.button("Settings").click()
    snapshot = chat.page.locator("body").aria_snapshot()
    named = "button|textbox|checkbox|slider|link|article|navigation|region|log|meter|complementary"
    assert not re.findall(rf"- (?:{named})(?: \[|:|$)", snapshot, re.MULTILINE)
    for part in SPOKEN:
        assert part in snapshot
    log = chat.page.get_by_role("log")
    expect(log).to_have_attribute("aria-live", "polite")
    for _ in range(2):
        chat.button("Chats").click()
    expect(chat.button("Chats")).to_have_attribute("aria-expanded", "true")
    assert chat.page.locator("html").get_attribute("lang") == "en"
