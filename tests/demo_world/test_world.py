"""The demo world: the same text everywhere, held-out text disjoint by construction, every statement true."""

import re
import sys
from itertools import islice

import pytest

from nanochat_jax.demo_world import (
    KINDS,
    demo_documents,
    document,
    documents,
    lookup,
    make_document,
    make_world,
    python_prose,
)
from nanochat_jax.demo_world.lexicon import number_word
from nanochat_jax.demo_world.plots import FABLES, STORIES
from tests import children

WORLD = make_world(0)
NUMBERS = {number_word(n): n for n in range(2000)} | {str(n): n for n in range(2000)}
_WORDS = "|".join(sorted((number_word(n) for n in range(100)), key=len, reverse=True))
_N = rf"(\d+|(?:{_WORDS})(?: hundred(?: (?:{_WORDS}))?)?)"


@pytest.fixture(scope="module")
def pages():
    """8,000 documents of each split, as (kind, text)."""
    made = {split: [make_document(i, split) for i in range(8000)] for split in ("train", "val")}
    return {split: [(page.kind, page.text) for page in pages] for split, pages in made.items()}


def _additions(text):
    """Every sum that is written in `text`, found without the generator's help: (a, b, c) with a + b = c claimed."""
    low = text.lower()
    for a, b, c in re.findall(r"(\d+) \+ (\d+) (?:=|is) (\d+)", low):
        yield int(a), int(b), int(c)
    for c, a, b in re.findall(r"(\d+) - (\d+) (?:=|is) (\d+)", low):
        yield int(a), int(b), int(c)
    for order, pattern in (
        ("abc", rf"\b{_N} plus {_N} is {_N}\."),
        ("abc", rf"how much is {_N} plus {_N}\? it is {_N}\."),
        ("abc", rf"the sum of {_N} and {_N} is {_N}\."),
        ("abc", rf"if you add {_N} and {_N}, you get {_N}\."),
        ("abc", rf"add {_N} and {_N}\. the answer is {_N}\."),
        ("cab", rf"\b{_N} minus {_N} is {_N}\."),
        ("cab", rf"how much is {_N} minus {_N}\? it is {_N}\."),
        ("acb", rf"take {_N} away from {_N} and {_N} is left"),
        ("acb", rf"subtract {_N} from {_N}\. the answer is {_N}\."),
    ):
        for found in re.findall(pattern, low):
            named = dict(zip(order, (NUMBERS[x] for x in found), strict=True))
            yield named["a"], named["b"], named["c"]


_STORY_FRAMES = (  # word problems: the pattern and the order of its numbers
    ("abc", r"has {n} \w+\. \w+ gives \w+ {n} more\. now \w+ has {n} "),
    ("abc", r"has {n} \w+ and \w+ has {n} \w+\. together they have {n} "),
    ("abc", r"there are {n} \w+ in the basket\. \w+ puts {n} more into it\. now there are {n} "),
    ("abc", r"finds {n} \w+\. in the evening \w+ finds {n} more\. that makes {n} "),
    ("abc", r"has {n} \w+\. \w+ buys {n} more at the market\. how many does \w+ have now\? \w+ has {n} "),
    ("abc", r"counted {n} \w+ on one table and {n} \w+ on the other\. how many are there in all\? there are {n} "),
    ("cab", r"has {n} \w+\. \w+ gives {n} of them to \w+\. now \w+ has {n} "),
    ("cab", r"there were {n} \w+ in the box\. \w+ took {n} of them out\. now there are {n} "),
    ("cab", r"had {n} \w+, but \w+ lost {n} of them on the way\. \w+ has {n} "),
    ("cab", r"wants to have {n} \w+\. \w+ already has {n} \w+\. how many are missing\? {n} "),
    ("cab", r"has {n} \w+ and \w+ has {n} \w+\. how many more does \w+ have\? \w+ has {n} more"),
)
_STORY_SUMS = tuple((order, re.compile(pattern.replace("{n}", _N))) for order, pattern in _STORY_FRAMES)


def _story_sums(text):
    for line in text.lower().splitlines():
        for order, pattern in _STORY_SUMS:
            found = pattern.search(line)
            if found:
                named = dict(zip(order, (NUMBERS[x] for x in found.groups()), strict=True))
                yield named["a"], named["b"], named["c"]


def _spelled(text):
    """Every word that is spelled in `text`, whatever stands around it."""
    for run in re.findall(r"\b[A-Za-z](?:-[a-z])+\b", text):
        yield run.replace("-", "").lower()
    for run in re.findall(r"\b[A-Za-z](?: \(\d\))?(?:, [a-z](?: \(\d\))?)+(?![a-z])", text):
        yield re.sub(r"[^a-z]", "", run.lower())
    for run in re.findall(r"\b[a-z](?: [a-z])+\.", text):
        yield re.sub(r"[^a-z]", "", run)
    for word in re.findall(r"(?:word|spell) ([a-z]+)\b", text):
        if word != "it":
            yield word


def test_one_document_is_a_pure_function_of_its_number():
    in_order = list(islice(documents(seed=3, split="val"), 200))
    assert [document(i, "val", 3) for i in reversed(range(200))] == in_order[::-1]
    assert document(17, "train", 0) != document(17, "train", 1)
    assert document(17, "train", 0) != document(17, "val", 0)
    for wrong in (
        lambda: document(0, "test"),
        lambda: document(-1, "train"),
        lambda: next(demo_documents("train", 0)),
        lambda: next(python_prose("test")),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_another_process_writes_the_same():
    say = "print('|'.join(document(i, s) for s in ('train', 'val') for i in range(60)))"
    code = f"from nanochat_jax.demo_world import document; {say}"
    env = {"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path)}
    there = children.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert there == "|".join(document(i, s) for s in ("train", "val") for i in range(60)) + "\n"


def test_every_kind_occurs_and_nothing_is_left_unfilled(pages):
    for split in pages:
        assert {kind for kind, _ in pages[split]} == {kind.name for kind in KINDS}
        for kind, text in pages[split]:
            assert text.isascii() and text == text.strip() and len(text) > 20
            bad = re.search(
                r"[\[\]{}|]|  | \n|\n\n| [.,!?]|\b[Aa] [aeio]\w+\b|\b[Aa]n [bcdfgjkpqtvwxyz]|"
                r"\bNone\b|\.\.|\b(\w+) \1\b",
                text,
            )
            counts = kind in ("spelling", "letter counting", "spelling game")
            assert bad is None or counts or bad.group().lower() in ("a one", "a is"), (kind, bad.group(), text)


def test_no_document_is_in_both_splits(pages):
    train, val = ({text for _, text in pages[s]} for s in ("train", "val"))
    assert len(train & val) == 0
    assert len(train) > 0.99 * len(pages["train"])


def test_sums_are_right_and_disjoint(pages):
    found = {}
    for split in pages:
        triples = [t for _, text in pages[split] for t in (*_additions(text), *_story_sums(text))]
        assert len(triples) > 5_000
        for kind, text in pages[split]:  # every word problem is understood by this test
            assert kind != "word problems" or len(list(_story_sums(text))) == len(text.splitlines()), text
        assert all(a + b == c for a, b, c in triples)
        found[split] = {(min(a, b), max(a, b)) for a, b, _ in triples}
    assert len(found["val"]) > 200 and found["train"].isdisjoint(found["val"])


def test_products_equations_comparisons_and_days(pages):
    products, equations, days = {}, {}, set()
    week = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for split in pages:
        products[split], equations[split] = set(), set()
        for _, text in pages[split]:
            for a, b, c in re.findall(r"(\d+) (?:\*|times) (\d+) (?:=|is) (\d+)", text):
                assert int(a) * int(b) == int(c)
                products[split].add(frozenset((int(a), int(b))))
            for a, b, c, rest in re.findall(r"(\d+)\*x \+ (\d+) = (\d+)(.*)", text):
                x = re.search(r"x is (\d+)\.", rest)
                assert x and int(a) * int(x[1]) + int(b) == int(c)
                equations[split].add((a, b, c))
            for a, b in re.findall(r"(\d+) is more than (\d+)", text):
                assert int(a) > int(b)
            for a, b in re.findall(r"(\d+) is less than (\d+)", text):
                assert int(a) < int(b)
            for a, b in re.findall(r"[Ii]f yesterday was (\w+), then tomorrow will be (\w+)", text):
                assert (week.index(a) + 2) % 7 == week.index(b)
                days.add(a)
    assert days == set(week)
    assert products["val"] and products["train"].isdisjoint(products["val"])
    assert len(equations["val"]) > 40 and equations["train"].isdisjoint(equations["val"])
    assert ("5", "3", "13") in equations["train"]  # the question that the reference asks its models


def test_spelled_words_are_right_and_disjoint(pages):
    found = {}
    for split in pages:
        found[split] = set()
        for kind, text in pages[split]:
            if kind in ("spelling", "letter counting", "spelling game"):
                for line in text.splitlines():
                    words = set(_spelled(line))
                    assert len(words) <= 1, line  # what is spelled is what is named
                    found[split] |= words
                for word, n in re.findall(r"The word (\w+) is spelled [a-z-]+\. It has (\w+) letters", text):
                    assert len(word) == NUMBERS[n]
                for letter, n, word in re.findall(r"The letter (\w) appears (\w+) times? in the word (\w+)", text):
                    assert word.count(letter) == NUMBERS[n]
                for letter, word, n in re.findall(r"How often is (\w) in (\w+)\? \S+ It is there (\w+) times?", text):
                    assert word.count(letter) == NUMBERS[n]
                for letter, word, n in re.findall(
                    r"letter (\w) appear in (\w+)\?.* The letter \w appears (\w+) time", text
                ):
                    assert word.count(letter) == NUMBERS[n]
            else:
                assert not re.search(r"\b[A-Za-z](-[a-z]){2,}\b", text), text
    assert len(found["val"]) > 40 and len(found["train"]) > 400
    assert found["train"].isdisjoint(found["val"])


def _plot_pattern(plot):
    """The frame of a plot: its longest fixed words, by which a story can be recognised in plain text."""
    fixed = re.sub(r"\[[^\[\]]*\]", "[]", re.sub(r"\[[^\[\]]*\]", "[]", re.sub(r"\[[^\[\]]*\]", "[]", plot.text)))
    pieces = re.split(r"\[\]|\{[^}]*\}|%\w+%", re.sub(r"\s+", " ", fixed))
    return max(pieces, key=len).strip()


def test_each_plot_is_told_in_both_splits(pages):
    for split in pages:
        told = "\n".join(text for kind, text in pages[split] if kind in ("story", "fable"))
        for plot in STORIES + FABLES:
            assert _plot_pattern(plot) in told, (split, plot.name)


def test_story_combinations_are_disjoint(pages):
    """The hero, place and thing of some plots, read back from the text."""
    patterns = {
        "sharing": r"^(\w+) and \w+ were (.*?) when they found an? (.*?)\.",
        "stars": r"climbed .* with a blanket and an? (.*?)\. .* and (\w+) still dreams of (\w+)\.",
        "river": r"(\w+) had to bring an? (.*?) to (\w+) the",
        "snowman": r"^In the night .* called (\w+)\. .* with an? (.*?)\. .* the snowman an? (.*?) and an? (?:old|br)",
        "coins": r"(\w+) found a small bag (.*?)\. .* met (\w+) the",
    }
    for name, pattern in patterns.items():
        keys = {
            s: {found.groups() for kind, text in pages[s] if kind == "story" and (found := re.search(pattern, text))}
            for s in pages
        }
        assert len(keys["val"]) > 5 and len(keys["train"]) > 20, name
        assert keys["train"].isdisjoint(keys["val"]), name


_CLAIMS = (  # relation, pattern with the subject and the object as groups
    ("home", r"\b([A-Z]\w+) lives? in ([A-Z]\w+)\b"),
    ("home", r"\b([A-Z]\w+)'s home is in (\w+)\."),
    ("home", r"\b([A-Z]\w+) lived in ([A-Z]\w+)"),
    ("favorite_color", r"\b([A-Z]\w+)'s favorite color is (\w+)[.,]"),
    ("favorite_color", r"[Tt]he color ([A-Z]\w+) likes best is (\w+)[.,]"),
    ("favorite_food", r"\b([A-Z]\w+)'s favorite food is ([\w ]+)[.,]"),
    ("favorite_animal", r"\b([A-Z]\w+)'s favorite animal is the (\w+)[.,]"),
    ("friend", r"\b([A-Z]\w+)'s best friend is (\w+)\."),
    ("friend", r"\b([A-Z]\w+) is best friends with (\w+)\."),
    ("age", r"\b([A-Z]\w+) is ([\w-]+) years old\."),
    ("river", r"[Tt]he river (\w+) flows through (?P<s>[A-Z]\w+)"),
    ("market_day", r"[Tt]he market in (\w+) is on (\w+)\."),
    ("capital", r"[Tt]he capital of (\w+) is (\w+)\."),
    ("symbol", r"[Tt]he chemical symbol of (\w+) is (\w+)\."),
    ("opposite", r"[Tt]he opposite of (\w+) is (\w+)\."),
    ("next_day", r"[Tt]he day after (\w+) is (\w+)[.,]"),
    ("next_planet", r"[Tt]he planet after (\w+) is (\w+)\."),
    ("sound", r"\b[Aa]n? (\w+) (\w+s)[.,]"),
    ("animal_home", r"\b[Aa]n? (\w+) lives in ([\w ]+)[.,]"),
    ("legs", r"\b[Aa]n? (\w+) has (\w+) legs[.,]"),
    ("young", r"\b[Aa]n? (\w+)'s young is called an? (\w+)[.,]"),
)


def test_the_texts_say_what_the_world_says(pages):
    people = {p.name for p in WORLD.people}
    checked = dict.fromkeys((relation for relation, _ in _CLAIMS), 0)
    for split in pages:
        for _, text in pages[split]:
            for relation, pattern in _CLAIMS:
                for found in re.finditer(pattern, text):
                    subject, value = found.group(1), found.group(2)
                    if "s" in found.groupdict():
                        subject, value = value, subject
                    if relation in ("home", "age", "friend") and subject not in people:
                        continue
                    try:
                        expected = lookup(WORLD, subject, relation)
                    except KeyError:
                        continue
                    if relation == "sound" and value not in {a.sound for a in WORLD.animals}:
                        continue
                    checked[relation] += 1
                    assert value == expected, (text, subject, relation, value)
    assert min(checked.values()) > 20, checked


def test_training_text_answers_the_sample_prompts(pages):
    sentences = [
        "The capital of France is Paris",
        "The chemical symbol of gold is Au",
        "If yesterday was Friday, then tomorrow will be Sunday",
        "The opposite of hot is cold",
        "The planets of the solar system are: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, and Neptune",
        "My favorite color is ",
        "If 5*x + 3 = 13, then x is 2",
    ]
    text = "\n".join(text for _, text in pages["train"])
    assert [sentence for sentence in sentences if sentence not in text] == []
