"""What each chat stage is trained on: the reference's mixtures, the demo world's, or the user's own conversations.

Spec of the reference: midtraining 7.2, finetuning 8.2, reinforcement learning 9.1.
"""

from pathlib import Path
from typing import Any

import tasks
from nanochat_jax.data.chat_files import describe_samples, load_chat_file
from nanochat_jax.data.conversation_rows import Conversations
from nanochat_jax.stages.settings import ChatStageSettings
from nanochat_jax.training.job import Parent
from nanochat_jax.utils.paths import base_dir
from tasks import demo_world
from tasks.customjson import CustomJSON
from tasks.identity import write_identity_file
from tasks.task import Task, TaskMixture

IDENTITY_CONVERSATIONS = 1000


def mid(settings: ChatStageSettings, parent: Parent) -> tuple[Conversations, Conversations]:
    """(training, held-out) conversations of midtraining."""
    name = settings.model_name or parent.model_name
    if settings.demo:
        return demo_world.mid_mixture("train", model_name=name), demo_world.mid_mixture("val", model_name=name)
    data = settings.task_data
    identity = identity_task(name)
    train = [
        tasks.load("SmolTalk", "train", data),
        tasks.load("MMLU", "auxiliary_train", data),
        tasks.load("GSM8K", "train", data),
        identity,
        identity,
        tasks.load("SimpleSpelling", "train", data, size=200_000),
        tasks.load("SpellingBee", "train", data, size=80_000),
    ]
    return TaskMixture(train), TaskMixture(_chat_val(data))


def sft(settings: ChatStageSettings, parent: Parent, data: Path | None) -> tuple[Conversations, Conversations]:
    """(training, held-out) conversations of finetuning: the user's own (`data`) or the usual mixture. Beside the user's
    own, the name is trained on only if it is given: what they contain is the user's choice."""
    if data is not None:
        train, val = own(data, parent.tokenizer, settings.seed)
        if not settings.model_name:
            return train, val
        identity = identity_task(settings.model_name, stop=len(train))  # no more of them than of the user's
        print(f"with {len(identity):,} conversations about the name {settings.model_name}")
        return TaskMixture([_Rows(train), identity]), val
    name = settings.model_name or parent.model_name
    if settings.demo:
        return demo_world.sft_mixture("train", model_name=name), demo_world.sft_mixture("val", model_name=name)
    folder = settings.task_data
    if settings.recipe == "modern":
        return _modern_sft(settings, folder)
    train = [
        tasks.load("ARC-Easy", "train", folder),
        tasks.load("ARC-Challenge", "train", folder),
        tasks.load("GSM8K", "train", folder),
        tasks.load("SmolTalk", "train", folder, stop=10_000),
        identity_task(name),
        tasks.load("SimpleSpelling", "train", folder, size=300),
        tasks.load("SpellingBee", "train", folder, size=300),
    ]
    return TaskMixture(train), tasks.load("SmolTalk", "test", folder)


def _modern_sft(settings: ChatStageSettings, folder: Path | None) -> tuple[Conversations, Conversations]:
    """Some sets several times; conversations about the model's name only where it is given (as the reference)."""
    mmlu, gsm8k = tasks.load("MMLU", "auxiliary_train", folder), tasks.load("GSM8K", "train", folder)
    name = [identity_task(settings.model_name)] * 2 if settings.model_name else []
    train = [tasks.load("SmolTalk", "train", folder), *[mmlu] * 3, *[gsm8k] * 4, *name]
    return TaskMixture(train), TaskMixture(_chat_val(folder))


def _chat_val(folder: Path | None) -> list[Task]:
    return [
        tasks.load("SmolTalk", "test", folder),
        tasks.load("MMLU", "test", folder, stop=5200),
        tasks.load("GSM8K", "test", folder, stop=420),
    ]


def rl(settings: ChatStageSettings) -> tuple[Task, Task]:
    """(training, held-out) questions whose answers can be rewarded; strictly, so that their form is learnt, too."""
    if settings.demo:
        return demo_world.rl_task("train"), demo_world.rl_task("val")
    train, val = (tasks.load("GSM8K", split, settings.task_data, strict=True) for split in ("train", "test"))
    return train, val


def own(path: Path, tokenizer, seed: int) -> tuple[Conversations, Conversations]:
    """The user's conversations, one in twenty held out, the others shuffled: people sort their files by topic. Shows
    what was read, what was not, and what will be trained on."""
    file = load_chat_file(path)
    for line, reason in file.problems[:10]:
        print(f"{path}, line {line}: left out: {reason}")
    if file.bad_lines > 10:
        print(f"{path}: {file.bad_lines - 10} more lines left out")
    if file.ignored:
        names = ", ".join(f"{name} ({count:,})" for name, count in file.ignored.most_common(20))
        print(f"{path}: keys that are not used, and in how many conversations: {names}")
    print(f"{path}: {len(file):,} conversations; the first ones, with the tokens that are trained on marked:")
    print(describe_samples(file, tokenizer))
    train, val = file.held_out()
    return train.shuffled(seed), val


class _Rows(Task):
    """Conversations as a task, so that they can be mixed with others."""

    name = "own"

    def __init__(self, conversations: Conversations):
        super().__init__()
        self._conversations = conversations

    def num_examples(self) -> int:
        return len(self._conversations)

    def get_example(self, index: int) -> dict[str, Any]:
        return self._conversations[index]

    def identity(self) -> dict[str, Any]:
        return {"rows": self._conversations.fingerprint()}


def identity_task(name: str, stop: int | None = None) -> Task:
    """Conversations about who the model is: the user's `identity_conversations.jsonl` in the base directory if there is
    one, else made from templates for the name; the first `stop` of them."""
    given = base_dir() / "identity_conversations.jsonl"
    if given.is_file():
        return CustomJSON(given, stop=stop)
    path = base_dir() / "task_data" / "identity" / f"{''.join(c if c.isalnum() else '_' for c in name)}.jsonl"
    write_identity_file(path, name, n=IDENTITY_CONVERSATIONS)
    return CustomJSON(path, stop=stop)


def eval_task(name: str, task_data: Path | None) -> Task:
    """The held-out side of a task by its name."""
    return demo_world.load(name, "val") if name.startswith("world/") else tasks.load(name, "test", task_data)
