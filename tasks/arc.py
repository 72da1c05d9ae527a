"""ARC: multiple choice science questions of primary and middle school, in an easy and a challenging set.

Clark et al. 2018, "Think you have Solved Question Answering? Try ARC". Hub rows are {question, choices: {text, label},
answerKey}; a local file may have {question, choices: [...], answer} instead, the labels then being A, B, C, ...
"""

from pathlib import Path

from tasks.hub import HubTask, Source
from tasks.records import Row
from tasks.task import Conversation, TaskError, evaluate_letter, mc_conversation

SUBSETS = ("ARC-Easy", "ARC-Challenge")


class ARC(HubTask):
    """``subset`` is "ARC-Easy" or "ARC-Challenge", ``split`` "train", "validation" or "test".

    Answers are judged by ``evaluate``: it takes one of the conversation's own ``letters`` (three to five, A.. or 1..).
    """

    eval_type = "categorical"
    baseline = 0.25
    splits = ("train", "validation", "test")

    def __init__(self, subset: str, split: str, task_data: str | Path | None = None, **slicing):
        if subset not in SUBSETS:
            raise TaskError(f"ARC has no subset {subset!r}; it has {', '.join(SUBSETS)}")
        self.check_split(split)
        self.name = subset
        source = Source("allenai/ai2_arc", subset, ("question", "choices", "answerKey|answer"), (subset,))
        super().__init__(source, split, task_data, **slicing)

    def conversation(self, row: Row) -> Conversation:
        choices = row["choices"]
        if isinstance(choices, dict):
            letters, texts = choices["label"], choices["text"]
        else:
            letters, texts = [chr(ord("A") + i) for i in range(len(choices))], choices
        return mc_conversation(row["question"], letters, texts, row["answerKey" if "answerKey" in row else "answer"])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return evaluate_letter(conversation, completion)
