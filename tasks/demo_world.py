"""Tasks of the demo world: arithmetic with the calculator, word problems, spelling, facts, multiple choice, ...

A row is made when it is asked for and is a pure function of (task, seed, split, index). What "val" asks is never in
"train", by the rules of `nanochat_jax.demo_world.draw`. Training data is as long as `size` says; a "val" task has only
different questions, so that an interval around its accuracy means what it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from nanochat_jax.demo_world import Draw, make_world
from nanochat_jax.demo_world.chat import KINDS, LETTERS, NAME, Quiz, animal_quiz, draw_for, quiz
from nanochat_jax.demo_world.chat.facts import names_only
from nanochat_jax.demo_world.chat.identity import identity
from nanochat_jax.demo_world.chat.problems import problem
from nanochat_jax.demo_world.draw import stable_hash
from tasks.task import Conversation, Task, TaskError, TaskMixture, TaskSequence, evaluate_letter, mc_conversation

TRAIN_SIZE = 100_000
VAL_TRIES = 50  # a val task looks at most at this many candidates for each row before it says there are no more
SFT_SEED = 1  # midtraining has seed 0: finetuning sees new rows
LESSON_SEED = 100  # its rows differ from those that follow
_NUMBER = re.compile(r"\d+")
_SPELLED = re.compile(r"[a-z](?:-[a-z])+")


def final_text(completion: str) -> str:
    """What the assistant says after its last tool call (all of it where there was none)."""
    return completion.rsplit("<|output_end|>", 1)[-1]


def final_number(completion: str) -> int | None:
    """The last whole number in `final_text`; None where there is none."""
    found = _NUMBER.findall(final_text(completion))
    return int(found[-1]) if found else None


def used_tool(completion: str) -> bool:
    """Whether the completion called the calculator and got an answer."""
    return "<|python_end|>" in completion and "<|output_start|>" in completion


def _reference(conversation: Conversation) -> str:
    """The text that the reference answer ends with."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class WorldTask(Task):
    """Conversations of one kind; subclasses say how to make and how to judge one."""

    kind: ClassVar[str]
    val_size: ClassVar[int] = 200

    def __init__(
        self,
        split: str,
        size: int | None = None,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ):
        """Raises TaskError for a split other than "train" and "val" and for a size below 1."""
        self.name = f"world/{self.kind}"
        if split not in ("train", "val"):
            raise TaskError(f"{self.name}: split must be 'train' or 'val', not {split!r}")
        size = size if size is not None else self.val_size if split == "val" else TRAIN_SIZE
        if size < 1:
            raise TaskError(f"{self.name}: size is {size}; it must be 1 or more")
        super().__init__(start, stop, step)
        self.split, self.size, self.seed = split, size, seed

    def num_examples(self) -> int:
        return self.size

    def make(self, draw: Draw) -> Conversation:
        """The conversation that `draw` leads to."""
        return KINDS[self.kind](make_world(0), draw)

    def key(self, conversation: Conversation) -> str:
        """What makes two rows the same question."""
        return conversation["messages"][0]["content"]

    def _make(self, index: int) -> Conversation:
        return self.make(draw_for(self.kind, index, self.split, self.seed))

    @cached_property
    def _different(self) -> list[Conversation]:
        rows: dict[str, Conversation] = {}
        for index in range(self.size * VAL_TRIES):
            row = self._make(index)
            rows.setdefault(self.key(row), row)
            if len(rows) == self.size:
                return list(rows.values())
        raise TaskError(f"{self.name}: there are only about {len(rows)} held-out rows; ask for a smaller size")

    def get_example(self, index: int) -> Conversation:
        return self._different[index] if self.split == "val" else self._make(index)

    def identity(self) -> dict[str, Any]:
        # The first rows stand for the generator: it depends on code, word lists and, a little, on the Python version.
        rows = json.dumps([self._make(index) for index in range(32)])
        return {"split": self.split, "size": self.size, "seed": self.seed, "rows": stable_hash(rows)}


class Arithmetic(WorldTask):
    """Sums and differences. Right: the result as last number, and the calculator used."""

    kind = "arithmetic"
    eval_type = "generative"
    val_size = 256

    def key(self, conversation: Conversation) -> str:
        return conversation["messages"][1]["content"][0]["text"]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return used_tool(completion) and final_number(completion) == final_number(_reference(conversation))


class WordProblems(WorldTask):
    """Word problems of two steps. Right: the result as last number."""

    kind = "word-problems"
    eval_type = "generative"
    val_size = 256

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return final_number(completion) == final_number(_reference(conversation))


class PracticeProblems(WordProblems):
    """The word problems of the training mix: a few have three steps."""

    kind = "practice-problems"


class LongProblems(WordProblems):
    """Word problems with `steps` steps (2 to 5; 3 unless told), for reinforcement learning.

    In training one in four has two steps: without them two-step problems, right before in 98 % of cases, fell to 80 %.
    """

    kind = "rl"
    rehearsal_share: ClassVar[float] = 0.25

    def __init__(self, split: str, size: int | None = None, seed: int = 0, steps: int = 3, **view: Any):
        self.steps = steps
        super().__init__(split, size, seed, **view)

    def make(self, draw: Draw) -> Conversation:
        rehearsal = self.split == "train" and draw.chance(self.rehearsal_share)
        return problem(make_world(0), draw, 2 if rehearsal else self.steps)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"steps": self.steps}


class Spelling(WorldTask):
    """Words to spell. Right: the first row of letters with hyphens is the word's."""

    kind = "spelling"
    eval_type = "generative"

    def key(self, conversation: Conversation) -> str:
        return conversation["word"]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        found = _SPELLED.search(completion.lower())
        return found is not None and found.group() == "-".join(conversation["word"])


class Letters(WorldTask):
    """Letters to count in words. Right: the count as last number."""

    kind = "letters"
    eval_type = "generative"

    def key(self, conversation: Conversation) -> str:
        return conversation["word"]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return final_number(completion) == final_number(_reference(conversation))


class Choice(WorldTask):
    """Multiple choice with four letters. The conversation also carries `about`: "animal" or the fact's relation."""

    kind = "choice"
    eval_type = "categorical"
    baseline = 0.25
    letters = LETTERS
    val_size = 400

    def ask(self, draw: Draw) -> Quiz:
        """The question that `draw` leads to."""
        return quiz(make_world(0), draw)

    def make(self, draw: Draw) -> Conversation:
        asked = self.ask(draw)
        row = mc_conversation(asked.question, LETTERS, asked.choices, LETTERS[asked.right])
        return row | {"about": asked.kind}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return evaluate_letter(conversation, completion)


class Animals(Choice):
    """Which of four words is an animal: the lesson from which finding a letter is learned; training only."""

    kind = "animals"

    def ask(self, draw: Draw) -> Quiz:
        return animal_quiz(draw)


class Facts(WorldTask):
    """Questions about the world. Right: the fact's object is in the answer, and no other object of the relation is."""

    kind = "facts"
    eval_type = "generative"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        relation, answer = conversation["relation"], conversation["object"]
        return names_only(make_world(0), relation, answer, completion, _reference(conversation))


class Identity(WorldTask):
    """Who the assistant is. Right: the answer has its name as a word of its own."""

    kind = "identity"
    eval_type = "generative"
    val_size = 64

    def __init__(self, split: str, size: int | None = None, seed: int = 0, model_name: str = NAME, **view: Any):
        self.model_name = model_name
        super().__init__(split, size, seed, **view)

    def make(self, draw: Draw) -> Conversation:
        return identity(make_world(0), draw, self.model_name)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(conversation['name'])}(?!\w)", completion, re.I) is not None

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model_name": self.model_name}


class Stories(WorldTask):
    """Stories on request; training only."""

    kind = "stories"


class SmallTalk(WorldTask):
    """Greetings, thanks, goodbyes; training only."""

    kind = "small-talk"
    val_size = 20


class Turns(WorldTask):
    """Conversations of several turns; training only."""

    kind = "turns"


_TASKS: dict[str, Callable[..., WorldTask]] = {
    f"world/{task.kind}": task
    for task in (
        Arithmetic, WordProblems, PracticeProblems, Spelling, Letters, Choice, Animals, Facts, Identity,
        LongProblems, Stories, SmallTalk, Turns,
    )
}  # fmt: skip
NAMES = tuple(_TASKS)
EVALS = (
    "world/arithmetic", "world/word-problems", "world/spelling", "world/letters", "world/choice", "world/facts",
    "world/identity",
)  # fmt: skip

# Shares of the conversations, not of the tokens.
MIX: dict[str, int] = {
    "world/arithmetic": 150, "world/practice-problems": 110, "world/spelling": 260, "world/letters": 130,
    "world/choice": 100, "world/facts": 180, "world/identity": 30, "world/stories": 30, "world/small-talk": 15,
    "world/turns": 35,
}  # fmt: skip

# How finetuning begins: of every 42,000 conversations so many questions for the animal, and so many of the mixture
# among them. From the start the mixture would drown the letters; let in all at once it would throw the model off.
LESSON = ((2100, 30), (260, 24), (240, 46), (200, 92), (140, 186))


def load(name: str, split: str, size: int | None = None, seed: int = 0, **options: Any) -> WorldTask:
    """The task `name` (one of `NAMES`), for example load("world/arithmetic", "val").

    `size` rows; without it 100,000 ("train") or the task's own number ("val"). `options` are the task's: `steps` of
    world/rl, `model_name` of world/identity, and start, stop, step. Raises TaskError for an unknown name or split.
    """
    if name not in _TASKS:
        raise TaskError(f"there is no task {name!r}; the world has {', '.join(NAMES)}")
    return _TASKS[name](split, size, seed, **options)


def _mixture(split: str, size: int, seed: int, model_name: str) -> TaskMixture:
    tasks = []
    for name, share in MIX.items():
        rows = max(1, size * share // sum(MIX.values()))
        if split == "val":
            rows = min(rows, _TASKS[name].val_size)  # pyright: ignore[reportFunctionMemberAccess]
        options = {"model_name": model_name} if name == "world/identity" else {}
        tasks.append(load(name, split, rows, seed, **options))
    return TaskMixture(tasks)


def mid_mixture(split: str, size: int | None = None, seed: int = 0, model_name: str = NAME) -> TaskMixture:
    """The conversations of midtraining: about `size` of them (12,000 "train", 500 "val")."""
    return _mixture(split, size or (500 if split == "val" else 12_000), seed, model_name)


def sft_mixture(split: str, size: int | None = None, seed: int = 0, model_name: str = NAME) -> Task:
    """The conversations of finetuning: the kinds and shares of midtraining, other rows (42,000).

    Training begins with a lesson of nothing but `Animals`, from which finding the letter of a choice is learned (some
    700 letters); among everything else, at any share that was tried, it is not.
    """
    size = size or (500 if split == "val" else 42_000)
    seed += SFT_SEED
    if split == "val":
        return _mixture(split, size, seed, model_name)
    lesson: list[Task] = []
    left = size
    for phase, (letters, others) in enumerate(LESSON):
        letters, others = (-(-count * size // 42_000) for count in (letters, others))
        parts: list[Task] = [load("world/animals", split, letters, seed + LESSON_SEED + phase)]
        if others:
            parts.append(_mixture(split, others, seed + LESSON_SEED + phase, model_name))
        lesson.append(TaskMixture(parts))
        left -= len(lesson[-1])
    return TaskSequence([*lesson, _mixture(split, max(1, left), seed, model_name)])


def rl_task(split: str, size: int | None = None, seed: int = 0, steps: int = 3) -> WorldTask:
    """The questions of reinforcement learning: word problems with `steps` steps, of which finetuning shows few."""
    return load("world/rl", split, size, seed, steps=steps)
