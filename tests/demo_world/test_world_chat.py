"""Conversations about the demo world: repeatable, true, and held-out combinations never in training."""

import json
import re
import sys

import pytest

from nanochat_jax.demo_world import Draw, facts, lookup, make_world, python_prose, sum_side, word_side
from nanochat_jax.demo_world.chat import KINDS, draw_for, quiz
from nanochat_jax.demo_world.chat import facts as chat_facts
from nanochat_jax.demo_world.chat.choice import animal_quiz, fact_quiz
from nanochat_jax.demo_world.chat.identity import asked_for
from nanochat_jax.demo_world.chat.problems import problem
from nanochat_jax.demo_world.chat.talk import calculated
from nanochat_jax.demo_world.lexicon import ANIMALS, COUNTABLE
from nanochat_jax.demo_world.relations import RELATIONS
from nanochat_jax.demo_world.words import made_up_word, real_words, words_of
from nanochat_jax.text.calculator import use_calculator
from nanochat_jax.text.chat_format import render_conversation
from tests import children

WORLD = make_world(0)
N = 2500
SPLITS = ("train", "val")
PEOPLE = {person.name for person in WORLD.people}
PLURALS = {plural for _, plural in COUNTABLE}


@pytest.fixture(scope="module")
def rows():
    """`N` conversations of every kind and split."""
    return {
        (kind, split): [make(WORLD, draw_for(kind, i, split, 0)) for i in range(N)]
        for kind, make in KINDS.items()
        for split in SPLITS
    }


def _texts(conversation):
    for message in conversation["messages"]:
        content = message["content"]
        yield from [content] if isinstance(content, str) else [part["text"] for part in content]


def _question(conversation):
    return conversation["messages"][0]["content"]


def _expressions(conversation):
    for message in conversation["messages"]:
        if not isinstance(message["content"], str):
            parts = message["content"]
            for part, result in zip(parts, parts[1:], strict=False):
                if part["type"] == "python":
                    assert result["type"] == "python_output"
                    yield part["text"], result["text"]


def test_conversations_render(rows):
    special = {}
    for (kind, _), conversations in rows.items():
        for conversation in conversations:
            ids, mask = render_conversation(
                conversation,
                lambda text: list(text.encode()),
                lambda name: special.setdefault(name, 1000 + len(special)),
            )
            assert len(ids) == len(mask) < 700 and sum(mask) > 1
            assert len(conversation["messages"]) in ((4, 6) if kind == "turns" else (2, 3))
            for text in _texts(conversation):
                assert text and text.isascii() and text == text.strip() and "  " not in text
                assert not re.search(r"[{}\[\]|]", text)


def test_the_same_everywhere():
    code = (
        "import json; from nanochat_jax.demo_world import make_world; from nanochat_jax.demo_world.chat import *\n"
        "print(json.dumps([m(make_world(0), draw_for(k, i, 'val', 5)) for k, m in KINDS.items() for i in range(9)]))"
    )
    result = children.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [make(WORLD, draw_for(kind, i, "val", 5)) for kind, make in KINDS.items() for i in range(9)]
    assert json.loads(result.stdout) == here
    assert here != [make(WORLD, draw_for(kind, i, "val", 6)) for kind, make in KINDS.items() for i in range(9)]


def test_tool_results_are_true(rows):
    """The result is what the engine will force, what Python says, and what the assistant goes on to say."""
    for kind in ("arithmetic", "word-problems", "practice-problems", "letters", "turns"):
        seen = 0
        for split in SPLITS:
            for conversation in rows[kind, split]:
                for expression, result in _expressions(conversation):
                    seen += 1
                    assert result == str(eval(expression)) == str(use_calculator(expression))
                if kind != "turns":
                    last = list(_texts(conversation))[-1]
                    assert re.findall(r"\d+", last)[-1] == result and not result.startswith("-")
        assert seen > N / 4
    with pytest.raises(ValueError, match="calculator"):
        calculated("2**3")


def test_held_out_sums_are_never_in_training(rows):
    """No two numbers of a held-out family are worked out in training, found in the text and not in the generator."""
    families = {}
    for split in SPLITS:
        families[split] = set()
        for kind in ("arithmetic", "turns"):
            for conversation in rows[kind, split]:
                for text in _texts(conversation):
                    for a, sign, b in re.findall(r"^(\d+) ?([+-]) ?(\d+) is", text):
                        low, high = sorted((int(a), int(b)) if sign == "+" else (int(a) - int(b), int(b)))
                        families[split].add((low, high))
        assert all(sum_side(*pair) == split for pair in families[split])
    assert len(families["train"]) > 2000 and len(families["val"]) > 1000
    assert not families["train"] & families["val"]
    two, three = ({p for p in families["val"] if len(str(p[1])) == n} for n in (2, 3))
    assert len(two) > 200 and len(three) > 300


def _problem_key(question):
    hero = next(word for word in re.findall(r"[A-Z]\w+", question) if word in PEOPLE)
    thing = next(word for word in re.findall(r"\w+", question) if word in PLURALS)
    return hero, thing, tuple(re.findall(r"\d+", question))


def test_word_problems_combine_what_training_never_combined(rows):
    keys = {split: set() for split in SPLITS}
    for split in SPLITS:
        for kind in ("word-problems", "practice-problems"):
            keys[split] |= {_problem_key(_question(conversation)) for conversation in rows[kind, split]}
        for steps in (3, 5):
            made = [problem(WORLD, draw_for("rl", i, split, 0), steps) for i in range(500)]
            assert all(len(re.findall(r"\d+", _question(row))) == steps + 1 for row in made)
            keys[split] |= {_problem_key(_question(row)) for row in made}
        assert len(keys[split]) > 1.9 * N
        assert {hero for hero, _, _ in keys[split]} == PEOPLE and {thing for _, thing, _ in keys[split]} == PLURALS
    assert not keys["train"] & keys["val"]
    with pytest.raises(ValueError, match="steps"):
        problem(WORLD, Draw(0, "val", 0), 6)


def _solve(question):
    """The answer of a word problem, read from its text: an independent solver."""
    total = 0
    story = question.split(" How many ")[0].lower()
    less = r"\b(?:gives(?! \w+ \d+ more)|give away|loses?|sells?|takes?|drops)\b"
    for sentence in re.split(r"\. | and (?=he |she |they |it |\w+ (?:gives|takes|has))", story):
        for number in re.findall(r"\d+", sentence):
            total += -int(number) if re.search(less, sentence) else int(number)
    return total


def test_word_problems_have_the_answer_that_the_story_has(rows):
    for split in SPLITS:
        for conversation in rows["word-problems", split] + rows["practice-problems", split]:
            answer = int(re.findall(r"\d+", list(_texts(conversation))[-1])[0])
            assert _solve(_question(conversation)) == answer >= 2, _question(conversation)


def _spelled_words(conversations):
    for conversation in conversations:
        for text in _texts(conversation):
            for letters in re.findall(r"^[a-z](?:-[a-z])+$", text):
                yield letters.replace("-", "")


def test_held_out_words_are_never_spelled_in_training(rows):
    words = {
        split: {word for kind in ("spelling", "letters", "turns") for word in _spelled_words(rows[kind, split])}
        for split in SPLITS
    }
    assert len(words["train"]) > 3000 and len(words["val"]) > 200
    assert not words["train"] & words["val"]
    assert all(word_side(word) == split for split in SPLITS for word in words[split])
    real = set(real_words())
    assert words["val"] <= real
    assert 0.25 < len(words["train"] & real) / len(words["train"]) < 0.7
    asked = {word for c in rows["letters", "train"] for word in re.findall(r'"([a-z]{3,})"', _question(c))}
    assert not asked & set(words_of("val"))
    in_prose = {word for text in python_prose() for word in re.findall(r"[a-z]+", text)}
    assert {"pebble", "function"} <= real and len(real & in_prose) > 1500 and "open" not in real
    made = [made_up_word(Draw(0, "train", i)) for i in range(2000)]
    assert all(3 <= len(word) <= 12 and word.isalpha() and word_side(word) == "train" for word in made)
    assert len(set(made) - real) > 1900


def test_fact_questions_are_true_and_hold_out_phrasings(rows):
    pairs = {split: set() for split in SPLITS}
    for split in SPLITS:
        for conversation in rows["facts", split]:
            question = re.sub(r"^(?:Hello!|Hi!|I have a question\.|Please help me\.) ", "", _question(conversation))
            sentence = conversation["messages"][1]["content"]
            assert conversation["object"] in sentence
            pairs[split].add((question, sentence))
    assert not pairs["train"] & pairs["val"]
    assert len(pairs["val"]) > 150 and len(pairs["train"]) > 1200
    # Every held-out question is about a fact that training asks for in other words.
    more = [KINDS["facts"](WORLD, draw_for("facts", i, "train", 0)) for i in range(5 * N)]
    trained = {conversation["messages"][1]["content"] for conversation in more}
    assert {sentence for _, sentence in pairs["val"]} <= trained


def test_phrasings():
    asked = chat_facts.asked_facts(WORLD)
    assert len(asked) == len(set(asked)) > 400 and set(asked) <= set(facts(WORLD))
    draw = Draw(0, "train", 0)
    owner = {}
    for fact in asked:
        train, val = (chat_facts.phrasings(fact, split) for split in SPLITS)
        assert len(train) >= 2 and not set(train) & set(val)
        # What the documents ask cannot be held out.
        assert not set(val) & set(RELATIONS[fact.relation].ask)
        sentence = chat_facts.answer_sentence(fact, draw)
        assert fact.object in sentence and fact.object == lookup(WORLD, fact.subject, fact.relation)
        assert chat_facts.names_only(WORLD, fact.relation, fact.object, sentence, sentence)
        for form in train + val:
            question = chat_facts.question(fact, form, draw)
            assert owner.setdefault(question, sentence) == sentence, f"{question} has two answers"


def test_identity_holds_out_phrasings(rows):
    def plain(text):
        text = re.sub(r"^(?:hello|hi|hey|good morning|sorry|excuse me)[!,.]? ", "", text.lower())
        return re.sub(r"[^a-z ]", "", text)

    asked = {split: {plain(_question(c)) for c in rows["identity", split]} for split in SPLITS}
    assert not asked["train"] & asked["val"]
    for split in SPLITS:
        assert all("nanochat" in c["messages"][1]["content"] for c in rows["identity", split])
        answers = {asked_for(Draw(1, split, i))[1] for i in range(500)}
        assert len(answers) == 3


def test_choice_holds_out_combinations():
    keys = {split: set() for split in SPLITS}
    for split in SPLITS:
        places = [0, 0, 0, 0]
        for i in range(N):
            asked = quiz(WORLD, Draw(0, split, i))
            assert len(set(asked.choices)) == 4
            places[asked.right] += 1
            keys[split].add((asked.question.lower(), frozenset(asked.choices)))
        assert min(places) > N / 4.6  # the place of the right answer says nothing
    assert not keys["train"] & keys["val"]


def test_choice_has_one_right_answer():
    for i in range(N):
        asked = fact_quiz(WORLD, Draw(0, "train", i))
        fits = [
            fact
            for fact in chat_facts.asked_facts(WORLD)
            if fact.relation == asked.kind
            and fact.object in asked.choices
            and re.search(rf"\b{fact.subject}\b", asked.question)
        ]
        assert [fact.object for fact in fits] == [asked.choices[asked.right]], asked
        asked = animal_quiz(Draw(0, "train", i))
        animals = {animal.kind for animal in ANIMALS}
        assert [choice in animals for choice in asked.choices].index(True) == asked.right, asked
        assert len(animals & set(asked.choices)) == 1 and asked.kind == "animal"


def test_stories_are_short_and_new(rows):
    for split in SPLITS:
        for conversation in rows["stories", split]:
            question, story = _texts(conversation)
            hero = next(word for word in re.findall(r"[A-Z]\w+", question) if word in PEOPLE)
            assert hero in story and 80 < len(story) < 400 and story[-1] in '."'
    heard = [{tuple(_texts(c))[1] for c in rows["stories", split]} for split in SPLITS]
    assert not heard[0] & heard[1]
