"""GSM8K: grade school word problems whose worked answers call a calculator.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". A row is {question, answer}; the answer holds tool
calls as ``<<expression=result>>`` and ends with ``#### number``.
"""

import re
from pathlib import Path

from tasks.hub import HubTask, Source
from tasks.records import Row
from tasks.task import Conversation, TaskError

SUBSETS = ("main", "socratic")

_TOOL_CALL = re.compile(r"(<<[^>]+>>)")
_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


class GSM8K(HubTask):
    """``split`` is "train" or "test", ``subset`` "main" or "socratic" (answers with guiding questions)."""

    name = "GSM8K"
    eval_type = "generative"
    splits = ("train", "test")

    def __init__(self, split: str, task_data: str | Path | None = None, subset: str = "main", **slicing):
        if subset not in SUBSETS:
            raise TaskError(f"GSM8K has no subset {subset!r}; it has {', '.join(SUBSETS)}")
        self.check_split(split)
        folders = ("gsm8k",) if subset == "main" else ()
        source = Source("openai/gsm8k", subset, ("question", "answer"), folders)
        super().__init__(source, split, task_data, **slicing)

    def conversation(self, row: Row) -> Conversation:
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": answer_parts(row["answer"])},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return evaluate_answer(conversation, completion)


def answer_parts(answer: str) -> list[dict[str, str]]:
    """An answer with ``<<expression=result>>`` in it as parts: text, python and python_output.

    A call is split at its last ``=``; without one the result is empty. The text around a call is left as it is,
    so an empty text may come first or between two calls, and the result usually comes again right after its output.
    """
    parts = []
    for piece in _TOOL_CALL.split(answer):
        if not (piece.startswith("<<") and piece.endswith(">>")):
            parts.append({"type": "text", "text": piece})
            continue
        expression, equals, result = piece[2:-2].rpartition("=")
        if not equals:
            expression, result = result, ""
        parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
    return parts


def extract_answer(text: str) -> str | None:
    """The number after the first ``#### ``, its commas removed; None if there is none.

    As in the reference: one space and no currency sign before the number, and a period after it is part of it.
    """
    found = _ANSWER.search(text)
    return found.group(1).strip().replace(",", "") if found else None


def evaluate_answer(conversation: Conversation, completion: str) -> bool:
    """Whether the completion's final number is, as a string, that of the reference answer ("10.0" is not "10").

    Unlike the reference, two texts without a number are not equal: no answer is never right.
    """
    if not isinstance(completion, str):
        raise TaskError(f"a completion is a string, not {type(completion).__name__}")
    content = conversation["messages"][-1]["content"]
    if not isinstance(content, list):
        raise TaskError("the last message must be the assistant's, as a list of parts")
    given = extract_answer(completion)
    return given is not None and given == extract_answer(content[-1]["text"])
