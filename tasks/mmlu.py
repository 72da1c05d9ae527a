"""MMLU: multiple choice questions from 57 subjects, four choices each.

Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding". Rows are {question, choices, answer,
subject}, the answer being 0..3 or, in a local file, A..D.
"""

from pathlib import Path

from tasks.hub import HubTask, Source
from tasks.records import Row
from tasks.task import Conversation, TaskError, evaluate_letter, mc_conversation

LETTERS = ("A", "B", "C", "D")
AUXILIARY = "auxiliary_train"


class MMLU(HubTask):
    """``split`` is "test", "validation", "dev", or "auxiliary_train" (99,842 questions from elsewhere, to train on).

    "train" means "auxiliary_train" too, with either ``subset``: MMLU itself has no training split. Its rows may lie one
    level down, under ``train``, as in the files that the reference used.
    """

    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25
    splits = ("train", AUXILIARY, "validation", "dev", "test")

    def __init__(self, split: str, task_data: str | Path | None = None, subset: str = "all", **slicing):
        if subset not in ("all", AUXILIARY):
            raise TaskError(f"MMLU has no subset {subset!r}; it has all, {AUXILIARY}")
        self.check_split(split)
        if subset == AUXILIARY and split not in ("train", AUXILIARY):
            raise TaskError(f"MMLU's {AUXILIARY} has no split {split!r}; it has only train")
        split = AUXILIARY if split == "train" else split
        source = Source("cais/mmlu", "all", ("question", "choices", "answer", "subject"), ("mmlu",), wrapper="train")
        super().__init__(source, split, task_data, **slicing)

    def conversation(self, row: Row) -> Conversation:
        answer, choices = row["answer"], row["choices"]
        if len(choices) != len(LETTERS):
            raise TaskError(f"{len(choices)} choices; {len(LETTERS)} are needed")
        if isinstance(answer, int):
            if not 0 <= answer < len(LETTERS):
                raise TaskError(f"answer {answer} is not 0 to 3")
            answer = LETTERS[answer]
        return {**mc_conversation(row["question"], LETTERS, choices, answer), "subject": row["subject"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return evaluate_letter(conversation, completion)
