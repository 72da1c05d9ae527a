"""Tasks of the demo world: sizes, different held-out rows, what counts as right, mixtures."""

import pytest

from tasks import demo_world
from tasks.task import TaskError

FORMS = {
    "text": "{}",
    "python": "<|python_start|>{}<|python_end|>",
    "python_output": "<|output_start|>{}<|output_end|>",
}


def _completion(conversation):
    """The reference answer as the engine would write it."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(FORMS[p["type"]].format(p["text"]) for p in content)


@pytest.mark.parametrize("name", demo_world.NAMES)
def test_every_task(name):
    train, val = demo_world.load(name, "train", 300), demo_world.load(name, "val")
    assert train.name == name and len(train) == 300 and len(demo_world.load(name, "train")) == demo_world.TRAIN_SIZE
    questions = [row["messages"][0]["content"] for row in val]
    assert len(questions) == len(set(questions)) == len(val)
    if name not in ("world/small-talk", "world/turns"):  # small talk has no sides, and turns may begin with it
        assert not set(questions) & {row["messages"][0]["content"] for row in train}
    again, other = demo_world.load(name, "train", 300), demo_world.load(name, "train", 300, seed=1)
    assert train[7] == again[7] != other[7] and train.fingerprint() == again.fingerprint()
    different = [other, demo_world.load(name, "train", 299), val]
    assert train.fingerprint() not in [task.fingerprint() for task in different]
    assert list(demo_world.load(name, "train", 300, start=3, stop=9, step=2)) == [train[3], train[5], train[7]]


@pytest.mark.parametrize("name", [*demo_world.EVALS, "world/rl"])
def test_the_reference_answer_is_right_and_others_are_not(name):
    task = demo_world.load(name, "val", 60)
    wrong = 0
    for row, other in zip(task, [*list(task)[1:], task[0]], strict=True):
        assert task.evaluate(row, _completion(row)) is True
        assert task.reward(row, _completion(row)) == 1.0
        if task.eval_type == "generative":
            assert task.evaluate(row, "") is False
        wrong += not task.evaluate(row, _completion(other))
    assert wrong > 20 or name == "world/identity"


def test_arithmetic_needs_the_tool():
    task = demo_world.load("world/arithmetic", "val")
    row = task[0]
    said = _completion(row)
    text = demo_world.final_text(said)
    assert task.evaluate(row, said) and not task.evaluate(row, text)
    assert not task.evaluate(row, said.replace(text, text.replace(" is ", " is 1")))
    assert not task.evaluate(row, said.replace(text, ""))


def test_final_number():
    assert demo_world.final_number("<|output_start|>7<|output_end|>It is 12, not 13.") == 13
    assert demo_world.final_number("7<|output_end|>nothing") is None
    assert not demo_world.used_tool("<|python_start|>1+1") and not demo_world.used_tool("")


def test_spelling_is_judged_by_its_letters():
    task = demo_world.load("world/spelling", "val")
    row = {"messages": [], "word": "pebble"}
    assert task.evaluate(row, "P-e-b-b-l-e") and task.evaluate(row, "It is p-e-b-b-l-e.")
    for wrong in ("p-e-b-l-e", "p-e-b-b-l-e-s", "pebble", "p, e, b, b, l, e", "o-p-e-b-b-l-e", ""):
        assert not task.evaluate(row, wrong)


def test_facts_must_be_named_alone_and_whole():
    task = demo_world.load("world/facts", "val")
    row = next(row for row in demo_world.load("world/facts", "train") if row["relation"] == "favorite_color")
    right = row["object"]
    wrong = "red" if right != "red" else "blue"
    assert task.evaluate(row, f"It is {right}.") and task.evaluate(row, right.upper())
    for text in (f"It is {wrong}.", f"It is {right} or {wrong}.", f"{right}ish", ""):
        assert not task.evaluate(row, text)


def test_choice():
    task = demo_world.Choice("val")
    assert task.eval_type == "categorical" and task.baseline == 0.25 and task.letters == ("A", "B", "C", "D")
    row = task[0]
    assert row["letters"] == ["A", "B", "C", "D"]
    assert sum(task.evaluate(row, letter) for letter in task.letters) == 1
    with pytest.raises(TaskError):
        task.evaluate(row, "E")
    assert {"animal"} < {row["about"] for row in task}


def test_the_model_may_have_another_name():
    task = demo_world.load("world/identity", "val", model_name="Robin")
    row = task[0]
    assert "Robin" in row["messages"][1]["content"]
    assert task.evaluate(row, "i am robin!") and not task.evaluate(row, "I am Robinson.")
    assert task.fingerprint() != demo_world.load("world/identity", "val").fingerprint()
    rows = list(demo_world.sft_mixture("train", 500, model_name="Robin"))
    names = [row["name"] for row in rows if "name" in row]
    assert names and set(names) == {"Robin"}


def test_difficulty_of_rl():
    for steps in (2, 5):
        row = demo_world.rl_task("val", 10, steps=steps)[0]
        expression = row["messages"][1]["content"][0]["text"]
        assert sum(expression.count(sign) for sign in "+-") == steps
    easy, hard = (demo_world.rl_task("val", 10, steps=steps) for steps in (2, 3))
    assert easy.fingerprint() != hard.fingerprint()


def test_mixtures():
    mid, sft = demo_world.mid_mixture("train", 1000), demo_world.sft_mixture("train", 1000)
    assert 980 <= len(mid) <= 1000 and 980 <= len(sft) <= 1000
    again = {str(row["messages"]) for row in mid} & {str(row["messages"]) for row in sft}
    assert len(again) < 0.2 * len(mid)  # small talk and a few questions with few forms
    for length in (10, 200, 42_000):
        assert 0.9 * length - 60 <= len(demo_world.sft_mixture("train", length)) <= length + 60
    val = {str(row["messages"][0]) for row in demo_world.sft_mixture("val") if len(row["messages"]) == 2}
    train = {str(row["messages"][0]) for row in mid}
    assert len(val & train) <= 20  # small talk alone
    assert set(demo_world.EVALS) | {"world/rl"} <= set(demo_world.NAMES)


def test_finetuning_begins_with_a_lesson_of_letters():
    rows = demo_world.sft_mixture("train", 4200)

    def letters(start, stop):
        return sum(rows[i].get("about") == "animal" for i in range(start, stop)) / (stop - start)

    shares = [letters(*window) for window in ((0, 210), (215, 240), (245, 270), (275, 300), (310, 340))]
    assert shares[0] > 0.9 and shares[1] > 0.5 and 0.6 > shares[4] > 0.2  # the others are let in little by little
    assert letters(400, 4100) < 0.15
    held_out = {str(row["messages"][0]) for row in demo_world.load("world/choice", "val")}
    lesson = {str(rows[i]["messages"][0]) for i in range(320)}
    assert not held_out & lesson
    assert all(rows[i].get("about") != "animal" or len(rows[i]["messages"]) == 2 for i in range(320))


def test_mistakes():
    for named, arguments in (("world/arithmetic", ("world/algebra", "val")), ("split", ("world/facts", "test")),
                             ("size", ("world/facts", "val", 0))):  # fmt: skip
        with pytest.raises(TaskError, match=named):
            demo_world.load(*arguments)
    with pytest.raises(TaskError, match="smaller"):
        demo_world.load("world/small-talk", "val", 500)[0]
    with pytest.raises(NotImplementedError):
        demo_world.load("world/stories", "val").evaluate({}, "")
