"""Tasks against the golden file (conversations, orders, slices, judgements, errors), and the defects that are fixed."""

import json
import random

import numpy as np
import pytest

import tasks
from nanochat_jax.data.readers import DataError
from nanochat_jax.utils.paths import offline
from tasks.arc import ARC
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, extract_answer
from tasks.humaneval import HumanEval, extract_imports, extract_program
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spelling import TEMPLATES, SimpleSpelling, SpellingBee
from tasks.task import STRICT, Task, TaskError, TaskIndexError, TaskMixture, TaskSequence, render_mc, shuffled_order
from tests.tokenizer_fixtures import golden, golden_tokenizer

GOLDEN = golden("tasks_v1")
WORDS = GOLDEN["spelling"]["words_in_file_order"]
EXECUTION = golden("exec_v1")["humaneval_evaluate"]


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    assert offline()


def folder(tmp_path, **rows):
    """A ``task_data`` folder: ``folder(tmp_path, gsm8k__train=[...])`` writes gsm8k/train.jsonl."""
    for name, lines in rows.items():
        path = tmp_path / "data" / (name.replace("__", "/").replace("_Easy", "-Easy") + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return tmp_path / "data"


class Numbers(Task):
    """Example i is i."""

    name = "numbers"

    def __init__(self, count, label="", **slicing):
        super().__init__(**slicing)
        self.count, self.label = count, label

    def num_examples(self):
        return self.count

    def get_example(self, index):
        assert 0 <= index < self.count
        return {"number": index, "label": self.label}

    def identity(self):
        return {"count": self.count, "label": self.label}


# --- slices, orders, mixtures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["slicing"], ids=lambda c: f"{c['num_examples']}[{c['start']}:{c['stop']}]")
def test_slices_equal_the_reference(case):
    slicing = {key: case[key] for key in ("start", "stop", "step")}
    if "exception" in case:
        assert case["exception"]["type"] == "AssertionError"
        with pytest.raises(AssertionError) as caught:
            len(Numbers(case["num_examples"], **slicing))
        assert isinstance(caught.value, ValueError)
        return
    task = Numbers(case["num_examples"], **slicing)
    # Defect of the reference, fixed: a stop beyond the data makes its length too large, and reading there fails.
    readable = [item for item in case["items"] if item != "IndexError"]
    assert [item["number"] for item in task] == readable
    assert [task[i]["number"] for i in range(len(task))] == readable
    assert len(task) == len(readable)
    assert len(task) == case["length"] or case["stop"] > case["num_examples"]


def test_every_index_is_checked():
    task = Numbers(10, start=2, stop=5)
    assert task[2]["number"] == 4 and task[np.int64(0)]["number"] == 2
    for index in (3, -1, 10):  # the reference would give examples 5 and 1, which are outside the slice
        with pytest.raises(IndexError, match=f"numbers.* {index}.* 3"):
            task[index]
    for index in ("0", 1.0, None):
        with pytest.raises(AssertionError):
            task[index]  # pyright: ignore
    with pytest.raises(TaskError, match="start.*11.*10"):
        len(Numbers(10, start=11, stop=20))


def test_order_of_data_sets():
    for count, order in GOLDEN["hf_shuffle_seed42"].items():
        assert shuffled_order(int(count)).tolist() == order


@pytest.mark.parametrize("case", GOLDEN["mixture"], ids=lambda c: str(c["lengths"]))
def test_mixtures_and_sequences_equal_the_reference(case):
    parts = [Numbers(count, str(i)) for i, count in enumerate(case["lengths"])]
    for combine, length, order in (
        (TaskMixture, case["mixture_len"], case["mixture_order"]),
        (TaskSequence, case["sequence_len"], case["sequence_order"]),
    ):
        combined = combine(parts)
        assert len(combined) == length
        assert [[int(item["label"]), item["number"]] for item in combined] == order


def test_a_slice_of_a_mixture_of_slices():
    case = GOLDEN["mixture_sliced"]
    parts = [Numbers(count, str(i), **case["inner_slices"]) for i, count in enumerate(case["lengths"])]
    mixture = TaskMixture(parts, **case["outer"])
    assert len(mixture) == case["length"]
    wanted = [[i, parts[i][place]["number"]] for i, place in case["order"]]
    assert [[int(item["label"]), item["number"]] for item in mixture] == wanted


def test_indices_outside_a_mixture():
    case = GOLDEN["mixture_errors"]
    parts = [Numbers(count) for count in case["lengths"]]
    combined = {"mixture": TaskMixture(parts), "sequence": TaskSequence(parts)}
    for call in case["calls"]:
        name, _, index = call["call"].removesuffix("]").partition("[")
        assert call["exception"]["type"] == "AssertionError"
        with pytest.raises(TaskIndexError) as caught:
            combined[name][int(index)]
        assert isinstance(caught.value, AssertionError) and isinstance(caught.value, IndexError)
    with pytest.raises(TaskError, match="at least one"):
        TaskMixture([])
    with pytest.raises(NotImplementedError, match="mixture is for training only"):
        combined["mixture"].evaluate({}, "")


def test_fingerprints_tell_contents_apart():
    different = [
        *(Numbers(*arguments) for arguments in ((5,), (6,), (5, "x"))),
        *(Numbers(5, **slicing) for slicing in ({"stop": 4}, {"start": 1}, {"step": 2})),
        TaskMixture([Numbers(5), Numbers(6)]),
        TaskMixture([Numbers(6), Numbers(5)]),
        TaskMixture([Numbers(5), Numbers(6)], stop=3),
        TaskSequence([Numbers(5), Numbers(6)]),
    ]
    assert len({task.fingerprint() for task in different}) == len(different)
    assert Numbers(5).fingerprint() == Numbers(5, stop=5).fingerprint() == Numbers(5, stop=99).fingerprint()
    assert TaskMixture([Numbers(5)]).fingerprint() == TaskMixture([Numbers(5)]).fingerprint()


def test_the_registry(tmp_path):
    assert tasks.CHAT_EVALS == ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
    assert set(tasks.CHAT_EVALS) < set(tasks.NAMES)
    for name, nearest in (("GSM9K", "GSM8K"), ("arc-easy", "ARC-Easy"), ("Spelling", "SpellingBee"), ("", "")):
        with pytest.raises(ValueError, match=f"{name!r}.*{nearest}"):
            tasks.load(name, "test", tmp_path)
    assert len(tasks.load("SpellingBee", "test", words=WORDS)) == 256
    assert len(tasks.load("SpellingBee", "test", words=WORDS, size=7, start=2)) == 5
    easy = tasks.load("ARC-Easy", "test", folder(tmp_path, ARC_Easy__test=GOLDEN["arc"]["rows"]), stop=2)
    assert (easy.name, easy.eval_type, easy.baseline, len(easy)) == ("ARC-Easy", "categorical", 0.25, 2)
    for name in tasks.NAMES:
        with pytest.raises(ValueError, match="'nonsense'"):
            tasks.load(name, "nonsense", tmp_path)


# --- multiple choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["render_mc"], ids=lambda c: c["question"][:20])
def test_layout_of_multiple_choice(case):
    assert render_mc(case["question"], case["letters"], case["choices"]) == case["output"]


def test_arc(tmp_path):
    case = GOLDEN["arc"]
    task = ARC("ARC-Easy", "train", folder(tmp_path, ARC_Easy__train=case["rows"]))
    assert list(task) == case["conversations"]
    for n, i in enumerate(shuffled_order(len(case["rows"]))):
        assert case["rows"][i]["question"] in task[n]["messages"][0]["content"]
    for judged in case["evaluate"]:
        assert task.evaluate(task[judged["index"]], judged["response"]) is judged["result"]
    with pytest.raises(AssertionError, match="'none of them'"):
        task.evaluate(task[0], "none of them")


def test_arc_with_plain_lists(tmp_path):
    rows = [{"id": "1", "question": "q", "choices": list("wxyz"), "answer": "C"}]
    task = ARC("ARC-Easy", "validation", folder(tmp_path, ARC_Easy__val=rows))
    labelled = {"question": "q", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "C"}
    assert task[0] == ARC("ARC-Easy", "test", folder(tmp_path, ARC_Easy__test=[labelled]))[0]
    assert task[0]["letters"] == list("ABCD") and task.evaluate(task[0], "C")


def test_mmlu(tmp_path):
    case = GOLDEN["mmlu"]
    nested = [{"train": row} for row in case["rows"]]
    letters = [{**row, "answer": "ABCD"[row["answer"]]} for row in case["rows"]]
    data = folder(
        tmp_path, mmlu__test=case["rows"], mmlu__mmlu_dev=letters, mmlu__auxiliary_train=nested, mmlu__validation=nested
    )
    assert list(MMLU("test", data)) == case["conversations"]
    assert list(MMLU("dev", data)) == case["conversations"]  # letters for numbers, the folder's name in front
    for split, subset in (("train", "auxiliary_train"), ("train", "all"), ("auxiliary_train", "all")):
        assert list(MMLU(split, data, subset)) == case["auxiliary_train_conversations"]
    task = tasks.load("MMLU", "test", data)
    assert (task.name, task.eval_type, task.baseline) == ("MMLU", "categorical", 0.25)
    for conversation in task:
        right = conversation["messages"][-1]["content"]
        assert all(task.evaluate(conversation, letter) is (letter == right) for letter in "ABCD")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"choices": list("abc"), "answer": 1}, "3 choices"),
        ({"choices": list("abcd"), "answer": 4}, "answer 4"),
        ({"choices": list("abcd"), "answer": "E"}, "answer 'E'"),
        ({"choices": None, "answer": 1}, "NoneType"),
    ],
)
def test_rows_that_are_no_question(tmp_path, row, reason):
    data = folder(tmp_path, mmlu__test=[{"question": "q", "subject": "s", **row}])
    with pytest.raises(TaskError, match=f"test.jsonl:1: .*{reason}"):
        MMLU("test", data)[0]


@pytest.mark.parametrize("odd", [None, 5, True, ["a"], {"a": 1}])
@pytest.mark.parametrize(
    "name, row, fields",
    [
        ("GSM8K", {"question": "q", "answer": "#### 1"}, ("question", "answer")),
        ("HumanEval", {"prompt": "p", "canonical_solution": "s", "entry_point": "e", "test": "t"}, ("prompt", "test")),
        ("MMLU", {"question": "q", "choices": list("abcd"), "answer": 1, "subject": "s"}, ("question", "choices")),
    ],
)
def test_no_text_is_made_of_what_is_none(tmp_path, name, row, fields, odd):
    for field in fields:
        bad = {**row, field: ["a", odd, "c", "d"] if field == "choices" else odd}
        data = folder(tmp_path / field, **{f"{name.lower()}__test": [bad]})
        with pytest.raises(TaskError, match="test.jsonl:1: .*not a string"):
            tasks.load(name, "test", data)[0]


def test_errors_have_the_reference_types(tmp_path):
    data = folder(tmp_path, gsm8k__train=GOLDEN["gsm8k"]["rows"], ARC_Easy__train=GOLDEN["arc"]["rows"])
    arc, gsm8k = ARC("ARC-Easy", "train", data), GSM8K("train", data)
    calls = {
        "ARC subset Bad": lambda: ARC("Bad", "train", data),
        "ARC split Bad": lambda: ARC("ARC-Easy", "Bad", data),
        "MMLU auxiliary_train/test": lambda: MMLU("test", data, "auxiliary_train"),
        "GSM8K subset Bad": lambda: GSM8K("train", data, "Bad"),
        "SmolTalk split val": lambda: SmolTalk("val", data),
        "ARC evaluate with letter outside choices": lambda: arc.evaluate(arc[0], "Z"),
        "GSM8K evaluate list response": lambda: gsm8k.evaluate(gsm8k[0], ["12"]),  # pyright: ignore
        "task['0']": lambda: gsm8k["0"],  # pyright: ignore
    }
    for case in GOLDEN["errors"]:
        assert case["exception"]["type"] == "AssertionError"
        with pytest.raises(AssertionError) as caught:
            calls[case["call"]]()
        assert isinstance(caught.value, ValueError) and str(caught.value)


# --- generative tasks -------------------------------------------------------------------------------------------------


def test_gsm8k(tmp_path):
    case = GOLDEN["gsm8k"]
    task = tasks.load("GSM8K", "train", folder(tmp_path, gsm8k__train=case["rows"]), strict=True)
    order = shuffled_order(len(case["rows"])).tolist()
    assert order == case["order_after_shuffle"]
    by_row = {row: task[position] for position, row in enumerate(order)}
    assert [by_row[row] for row in range(len(order))] == case["conversations"]
    answers = [extract_answer(c["messages"][1]["content"][-1]["text"]) for _, c in sorted(by_row.items())]
    assert answers == case["reference_answer"]
    for judged in case["completions"]:
        conversation, completion = by_row[judged["row"]], judged["completion"]
        assert extract_answer(completion) == judged["extracted"]
        assert task.evaluate(conversation, completion) is bool(judged["evaluate"])
        assert task.reward(conversation, completion) == judged["reward"]
    assert (task.eval_type, task.baseline, task.judge) == ("generative", 0.0, STRICT)
    assert GSM8K("train", tmp_path / "data").judge not in (None, STRICT)
    assert GSM8K("train", tmp_path / "data").fingerprint() == task.fingerprint()  # the questions are the same


def test_no_answer_is_never_right(tmp_path):
    """Defect of the reference, fixed (golden README 4.7): without a number on either side it says correct."""
    rows = [{"question": "q", "answer": "I do not know."}]
    task = GSM8K("test", folder(tmp_path, gsm8k__test=rows))
    assert extract_answer(rows[0]["answer"]) is None
    assert task.evaluate(task[0], "nothing either") is False and task.reward(task[0], "") == 0.0
    assert task.evaluate(task[0], "#### 1") is False


def test_humaneval_extraction():
    for case in GOLDEN["humaneval"]["extract_program"]:
        assert extract_program(case["completion"]) == case["program"]
    for case in GOLDEN["humaneval"]["extract_imports"]:
        assert extract_imports(case["prompt"]) == case["imports"]


def test_humaneval(tmp_path):
    from tasks.sandbox import isolation_available

    data = folder(tmp_path, humaneval__test=EXECUTION["rows"])
    # The programs below are harmless; where the host cannot isolate them they may run all the same.
    task = HumanEval("test", data, allow_unsafe_code=isolation_available()[0] == "none", strict=True)
    order = shuffled_order(len(EXECUTION["rows"])).tolist()
    by_row = {row: task[position] for position, row in enumerate(order)}
    assert [by_row[row] for row in range(len(order))] == EXECUTION["conversations"]
    passes = [task.evaluate(c, c["messages"][1]["content"]) for _, c in sorted(by_row.items())]
    assert passes == EXECUTION["canonical_solution_passes"]
    for case in EXECUTION["cases"]:
        assert task.evaluate(by_row[case["row"]], case["completion"]) is case["success"], case["completion"]
    right = next(case for case in EXECUTION["cases"] if case["success"])
    assert task.reward(by_row[right["row"]], right["completion"]) == 1.0 and task.judge == STRICT


def test_smoltalk(tmp_path):
    case = GOLDEN["smoltalk"]
    task = SmolTalk("train", folder(tmp_path, smoltalk__train=case["rows"]), **case["kwargs"])
    assert len(task) == case["length"] and list(task) == case["conversations"]
    order = shuffled_order(len(case["rows"])).tolist()
    assert order == case["order_after_shuffle"] and task.eval_type is None


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "1 messages"),
        ([{"role": "user", "content": "u"}, {"role": "user", "content": "v"}], "role 'user'"),
        ([{"role": "user", "content": "u"}, {"role": "assistant", "content": None}], "NoneType"),
        ("hello", "str"),
    ],
)
def test_smoltalk_refuses_other_shapes(tmp_path, messages, reason):
    task = SmolTalk("train", folder(tmp_path, smoltalk__train=[{"messages": messages}]))
    with pytest.raises(TaskError, match=reason):
        task[0]


# --- spelling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_spelling_equals_the_reference(split):
    bee = SpellingBee(words=WORDS, split=split, v1_compat=True)
    simple = SimpleSpelling(words=WORDS, split=split, v1_compat=True)
    for task, cases in ((bee, "spelling_bee"), (simple, "simple_spelling")):
        for case in GOLDEN["spelling"][split][cases]:
            assert task[case["index"]] == case["conversation"]
    assert len(bee) == len(simple) == GOLDEN["spelling"]["len_default"]
    assert bee.words == WORDS and simple.words == GOLDEN["spelling"]["simple_spelling_word_order"]
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 51


def test_spelling_judgements():
    task = SpellingBee(words=WORDS, strict=True)
    for case in GOLDEN["spelling"]["evaluate"]:
        assert task.evaluate(task[case["index"]], case["completion"]) is bool(case["evaluate"])
        assert task.reward(task[case["index"]], case["completion"]) == case["reward"]
    for conversation in SpellingBee(words=WORDS, split="test", size=50):
        parts = conversation["messages"][1]["content"]
        # Independently of how it was made: the tool call, evaluated by Python, gives the answer.
        assert str(eval(parts[2]["text"])) == parts[3]["text"]
        assert task.evaluate(conversation, "".join(part["text"] for part in parts))


def test_spelling_tests_are_not_trained_on():
    """Defect of the reference, fixed (spec 2.12): its test example i is training example i + 1."""
    words = [a + b + c for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyz"]
    train = SpellingBee(2000, "train", words=words)
    seen = {json.dumps(conversation) for conversation in train}
    old = SpellingBee(256, "test", words=words, v1_compat=True)
    assert all(old[i] == train[i + 1] for i in range(256))
    new = [json.dumps(conversation) for conversation in SpellingBee(256, "test", words=words)]
    # Six hundred words and fifty templates: a few may meet by chance, not all by construction.
    assert sum(conversation in seen for conversation in new) < 10
    expected = SpellingBee(1, words=words)
    rng = random.Random(10_000_000 + 3)
    expected._random = lambda index: rng
    assert expected[0] == json.loads(new[3])
    assert old.fingerprint() != SpellingBee(256, "test", words=words).fingerprint()
    compat = SpellingBee(256, "train", words=words, v1_compat=True)
    assert compat.fingerprint() == SpellingBee(256, "train", words=words).fingerprint()


def test_word_lists(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="words_alpha.txt"):
        tasks.load("SimpleSpelling", "train", tmp_path)
    (tmp_path / "words_alpha.txt").write_bytes(b"cat\r\n\ndog \no'clock\ncaf\xe9\n")
    task = tasks.load("SimpleSpelling", "train", tmp_path, size=3)
    assert sorted(task.words) == ["cat", "dog"] and "left out 2 lines" in caplog.text  # pyright: ignore
    assert task.fingerprint() == SimpleSpelling(3, words=["cat", "dog"]).fingerprint()
    assert task.fingerprint() != SimpleSpelling(3, words=["dog", "cat"]).fingerprint()
    (tmp_path / "words_alpha.txt").write_text("\n1\n")
    with pytest.raises(DataError, match="words_alpha.txt"):
        tasks.load("SimpleSpelling", "train", tmp_path)
    for words in (["it's"], [""], ["é"], []):
        with pytest.raises(ValueError):
            SpellingBee(words=words)
    for size in (0, 10_000_001):
        with pytest.raises(ValueError, match="size"):
            SpellingBee(size, words=WORDS)
    with pytest.raises(ConnectionError, match="NANOCHAT_OFFLINE.*words_alpha.txt"):
        SpellingBee()


# --- the user's own conversations -------------------------------------------------------------------------------------


def test_customjson(tmp_path):
    case = GOLDEN["customjson"]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(case["lines"]), encoding="utf-8")
    task = CustomJSON(path)
    assert len(task) == case["length"] and list(task) == case["conversations"]
    assert task.fingerprint() != CustomJSON(path, stop=1).fingerprint()
    # Defect of the reference, fixed: a missing file is no conversation and no error there.
    assert case["missing_file_length"] == 0
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        CustomJSON(tmp_path / "gone.jsonl")
    for empty in ("", "\n  \n"):
        path.write_text(empty)
        with pytest.raises(DataError, match="own.jsonl"):
            CustomJSON(path)


@pytest.mark.parametrize("case", GOLDEN["customjson"]["errors"], ids=lambda c: c["line"][:40])
def test_customjson_errors_have_the_reference_types(case, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(GOLDEN["customjson"]["lines"][0] + "\n\n" + case["line"] + "\n")
    kind = {"AssertionError": AssertionError, "JSONDecodeError": json.JSONDecodeError}[case["exception"]["type"]]
    with pytest.raises(kind, match="own.jsonl:3: .+") as caught:
        CustomJSON(path)
    assert isinstance(caught.value, ValueError)


def test_customjson_leaves_out_bad_lines_when_asked_to(tmp_path, caplog):
    path = tmp_path / "own.jsonl"
    bad = [case["line"].encode() for case in GOLDEN["customjson"]["errors"]]
    bad += [b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b"null"]
    path.write_bytes(b"\n".join([*bad, GOLDEN["customjson"]["lines"][0].encode(), b""]))
    task = CustomJSON(path, strict=False)
    assert len(task) == 1 and task.bad_lines == len(bad) == len(task.messages)
    for number, message in enumerate(task.messages, 1):
        assert message.startswith(f"{path}:{number}: ") and message in caplog.text
    path.write_bytes(b"\n".join(bad))
    with pytest.raises(DataError, match=f"{len(bad)} .*own.jsonl:1: "):
        CustomJSON(path, strict=False)


def test_every_conversation_renders(tmp_path):
    data = folder(
        tmp_path,
        gsm8k__train=GOLDEN["gsm8k"]["rows"],
        ARC_Easy__train=GOLDEN["arc"]["rows"],
        mmlu__test=GOLDEN["mmlu"]["rows"],
        humaneval__test=EXECUTION["rows"],
        smoltalk__train=GOLDEN["smoltalk"]["rows"],
    )
    chosen = {"GSM8K": "train", "ARC-Easy": "train", "MMLU": "test", "HumanEval": "test", "SmolTalk": "train"}
    parts = [tasks.load(name, split, data) for name, split in chosen.items()]
    parts += [tasks.load(name, "train", words=WORDS, size=20) for name in ("SpellingBee", "SimpleSpelling")]
    tokenizer = golden_tokenizer()
    for conversation in TaskMixture(parts):
        ids, mask = tokenizer.render_conversation(conversation)
        assert len(ids) == len(mask) and sum(mask) > 0
        prompt = tokenizer.render_for_completion(conversation)
        assert prompt == ids[: len(prompt)] and not any(mask[: len(prompt)])
