"""GSM8K: grade school word problems whose worked answers call a calculator.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems". A row is {question, answer}; the answer holds tool
calls as ``<<expression=result>>`` and ends with ``#### number``.
"""

import re
import unicodedata
from fractions import Fraction
from pathlib import Path

from tasks.hub import HubTask, Source
from tasks.records import Row
from tasks.task import STRICT, Conversation, TaskError, check_texts

SUBSETS = ("main", "socratic")
NUMBERS = "numbers compared as numbers"

_TOOL_CALL = re.compile(r"(<<[^>]+>>)")
_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_LENIENT = re.compile(
    r"""\s*(?:(?:so|the|final|answer|result|total|is|equals)\b\s*)*(?:[:≈→]|[-=]>|=)?\s*
    (?:(?:US|USD|EUR|GBP|INR|CAD|AUD|Rs\.?)\s*)?(?P<sign>[-+]?)[ ]?
    (?:(?P<whole>\d+)\s+(?=\d+\s*/\s*\d))?
    (?P<number>(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,2}(?!\d))?)
    (?:\s*/\s*(?P<over>\d+)(?![\d/]))?""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)


class GSM8K(HubTask):
    """``split`` is "train" or "test", ``subset`` "main" or "socratic" (answers with guiding questions).

    ``strict`` compares final numbers as strings, as the reference does; else they are compared as numbers.
    """

    name = "GSM8K"
    eval_type = "generative"
    splits = ("train", "test")

    def __init__(
        self,
        split: str,
        task_data: str | Path | None = None,
        subset: str = "main",
        strict: bool = False,
        **slicing,
    ):
        if subset not in SUBSETS:
            raise TaskError(f"GSM8K has no subset {subset!r}; it has {', '.join(SUBSETS)}")
        self.check_split(split)
        self.strict, self.judge = strict, STRICT if strict else NUMBERS
        folders = ("gsm8k",) if subset == "main" else ()
        source = Source("openai/gsm8k", subset, ("question", "answer"), folders)
        super().__init__(source, split, task_data, **slicing)

    def conversation(self, row: Row) -> Conversation:
        check_texts(question=row["question"], answer=row["answer"])
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": answer_parts(row["answer"])},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return evaluate_answer(conversation, completion, self.strict)


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


def final_number(text: str) -> Fraction | None:
    """The number after the first ``####`` that has one, however it is written: with a currency, thousands separators,
    trailing zeros, a period, a unit, markup of Markdown or LaTeX, as a fraction. None if there is none."""
    for mark in re.finditer("#{4,}", text):
        line, *below = text[mark.end() :].split("\n", 2)
        if not line.strip("*_` \t\r") and below:  # on a line of its own
            line = below[0] if not re.search(r"[^\W\d]", below[0]) else ""
        found = _LENIENT.match(_without_markup(line))
        if found:
            return _value(found)
    return None


def _without_markup(line: str) -> str:
    line = re.sub(r"(?<=\d)(?:[\u00a0\u202f\u2009'’_]|\\,|\{,\}|\\ )(?=\d{3})", "", line)  # between thousands
    line = unicodedata.normalize("NFKC", line).replace("\u2212", "-").replace("\u2013", "-")
    line = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", line)
    line = re.sub(r"\\(?:boxed|text(?:bf|it)?|math(?:bf|rm|it)?|left|right|[^\w\s])", "", line)
    line = "".join(c for c in line if unicodedata.category(c) != "Sc" and c not in "{}[]()*_`~\"'“”‘’")
    return re.sub(r"^(\s*\d{1,3})((?: \d{3})+)(?=\W*$)", lambda m: m[1] + m[2].replace(" ", ""), line)


def _value(found: re.Match) -> Fraction | None:
    sign, whole, number, over = found.group("sign", "whole", "number", "over")
    value = Fraction(number.replace(",", "").rstrip("."))
    if over:
        if int(over) == 0:
            return None
        value = int(whole or 0) + value / int(over)
    return -value if sign == "-" else value


def evaluate_answer(conversation: Conversation, completion: str, strict: bool = False) -> bool:
    """Whether the completion's final number is that of the reference answer: as numbers, or with ``strict`` as strings
    as in the reference ("10.0" is not "10", "$10" is none).

    Unlike the reference, two texts without a number are not equal: no answer is never right.
    """
    if not isinstance(completion, str):
        raise TaskError(f"a completion is a string, not {type(completion).__name__}")
    content = conversation["messages"][-1]["content"]
    if not isinstance(content, list):
        raise TaskError("the last message must be the assistant's, as a list of parts")
    number_in = extract_answer if strict else final_number
    given = number_in(completion)
    return given is not None and given == number_in(content[-1]["text"])
