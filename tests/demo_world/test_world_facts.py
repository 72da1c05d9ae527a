"""The world as data, its notation for sentences, the prose from Python, and the demo mix."""

import hashlib
import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.demo_world import demo_documents, document, facts, lookup, make_world, python_prose, side, sum_side
from nanochat_jax.demo_world.documents import PROSE_PASSES, make_document
from nanochat_jax.demo_world.draw import Draw
from nanochat_jax.demo_world.lexicon import number_word
from nanochat_jax.demo_world.relations import RELATIONS, ask, short_answer, state, wrong_answers
from nanochat_jax.demo_world.template import Template, article, join_words

WORLD = make_world(0)


@given(st.integers(0, 10_000))
def test_every_world_is_consistent(seed):
    world = make_world(seed)
    names = [p.name for p in world.people]
    assert len(set(names)) == len(names) and len({p.pet_name for p in world.people}) == len(names)
    towns = {t.name for t in world.towns}
    for p in world.people:
        friend = world.person(p.friend)
        assert friend.friend == p.name and friend.home == p.home and friend is not p
        assert friend.is_child == p.is_child and p.home in towns and (p.job == "student") == p.is_child
    assert {p.home for p in world.adults} == towns  # the stories need a grown-up in every town


def test_facts_have_one_answer_and_a_way_to_say_them():
    all_facts = facts(WORLD)
    keys = [(f.subject, f.relation) for f in all_facts]
    assert len(set(keys)) == len(keys) > 600
    draw = Draw(1, "train", 1)
    for fact in all_facts:
        assert fact.relation in RELATIONS and lookup(WORLD, fact.subject, fact.relation) == fact.object
        said, asked, answer = state(fact, draw), ask(fact, draw), short_answer(fact, draw)
        assert fact.object in said and said.endswith(".") and said[0] != " "
        assert asked.endswith("?") and fact.object in answer
        assert not re.search(r"[\[\]{}|]", said + asked + answer)
        wrong = wrong_answers(WORLD, fact, draw)
        assert fact.object not in wrong and len(set(wrong)) == len(wrong)
    with pytest.raises(KeyError):
        lookup(WORLD, "Mia", "shoe size")


def test_the_public_world_and_its_texts_stay_the_same():
    """A change detector: if the world or a text is changed on purpose, put the new sums here and say so in the log."""
    people = "\n".join(map(str, facts(WORLD)))
    assert hashlib.sha256(people.encode()).hexdigest()[:16] == "7f9988cadcab4616"
    made = [make_document(i, s) for s in ("train", "val") for i in range(500)]
    # the words that are spelled come from the prose of the installed Python too
    text = "\n\n".join(d.text for d in made if d.kind not in ("spelling", "letter counting", "spelling game"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "70d5315115e20beb"


def test_number_words():
    said = {0: "zero", 13: "thirteen", 40: "forty", 47: "forty-seven", 100: "one hundred", 120: "one hundred twenty",
            999: "nine hundred ninety-nine", 1000: "one thousand", 2305: "two thousand three hundred five"}  # fmt: skip
    assert {n: number_word(n) for n in said} == said
    assert len({number_word(n) for n in range(10_000)}) == 10_000
    for n in (-1, 10_000):
        with pytest.raises(ValueError):
            number_word(n)


def test_articles_and_lists():
    assert [article(w) for w in ("apple", "hour", "unicorn", "owl", "one", "king")] == [
        "an apple", "an hour", "a unicorn", "an owl", "a one", "a king",
    ]  # fmt: skip
    assert [join_words(list(w)) for w in ("a", "ab", "abc")] == ["a", "a and b", "a, b, and c"]


def test_templates():
    draw = Draw(0, "train", 0)
    t = Template("[{^x}|{^x}] saw {a y}[| .[|]] ¶ and {A x}")
    assert t.names() == {"x", "y"}
    assert t.render(draw, {"x": "ink", "y": "owl"}).replace(" .", "") == "Ink saw an owl\nand An ink"
    both = {Template("[a|[b|c]]").render(draw, {}) for _ in range(100)}
    assert both == {"a", "b", "c"}
    for bad in ("[a|b", "a]b", "a|b", "{a", "a}"):
        with pytest.raises(ValueError):
            Template(bad)
    with pytest.raises(KeyError):
        Template("{nobody}").render(draw, {})


@given(st.integers(0, 600), st.integers(0, 600))
def test_a_number_family_has_one_side(a, b):
    assert sum_side(a, b) == sum_side(b, a)
    assert max(a, b) > 10 or sum_side(a, b) == "train"


def test_about_one_combination_in_ten_is_held_out():
    share = sum(side("x", i) == "val" for i in range(20_000)) / 20_000
    assert 0.09 < share < 0.11
    with pytest.raises(ValueError, match="val"):
        Draw(0, "val", 0).addends(0, 10)


def test_prose_is_plain_and_disjoint():
    train, val = list(python_prose("train")), list(python_prose("val"))
    assert sorted(train + val) == sorted(python_prose())
    assert 300_000 < sum(map(len, train + val)) < 1_500_000
    assert 0.03 < sum(map(len, val)) / sum(map(len, train + val)) < 0.2
    lines = [line for text in train + val for line in text.splitlines()]
    assert len(set(lines)) == len(lines) > 1000
    for line in lines:
        assert (
            line.isascii() and line[0].isupper() and line[-1] in ".!?" and not re.search(r">>>|__|\w\(|[{}<>=]", line)
        )


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_demo_mix(split):
    n = 400_000
    docs = list(demo_documents(split, n))
    total = sum(map(len, docs))
    assert n <= total < n + 5_000 and sum(map(len, docs[:-1])) < n
    assert docs == list(demo_documents(split, n))
    prose = set(python_prose(split))
    used = [d for d in docs if d in prose]
    assert all(used.count(d) <= PROSE_PASSES[split] for d in set(used))
    assert 0.05 < sum(map(len, used)) / total < 0.14
    assert [d for d in docs if d not in prose] == [document(i, split) for i in range(len(docs) - len(used))]
    assert set(docs).isdisjoint(islice(demo_documents("val" if split == "train" else "train", n), 2000))
