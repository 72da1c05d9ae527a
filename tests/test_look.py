"""dev.look, by pages that do not fit: what is too wide is named, what scrolls inside itself is not."""

from dev.look import JUDGE

pytest_plugins = ["tests.page_browser"]
LONG = "x" * 300


def found(browser, article, width):
    tab = browser.new_page(viewport={"width": width, "height": 600})
    tab.set_content(f"<body style='margin: 0'><article>{article}</article></body>")
    problems = tab.evaluate(JUDGE, width > 1000)
    tab.close()
    return problems


def test_what_does_not_fit_is_named(browser):
    assert found(browser, "<p>short</p><pre>x = 1</pre>", 1280) == []
    picture = "<img alt='a map' style='width: 600px; height: 9px'>"
    assert found(browser, picture, 390) == ["the page is 210 pixels too wide", "cut off at the right: a map"]
    assert found(browser, picture, 1280) == []
    scrolling = f"<pre style='overflow-x: auto'>{LONG}</pre>"
    assert found(browser, scrolling, 390) == []
    assert found(browser, scrolling, 1280) == [f"code wider than its box: {LONG[:60]}"]
    assert found(browser, "<span class='math'>$x$</span>", 1280) == ["math that is not drawn: $x$"]
