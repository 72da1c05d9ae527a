"""SmolTalk: general conversations for small models (HuggingFaceTB/smol-smoltalk). Rows are {messages}."""

from pathlib import Path

from tasks.hub import HubTask, Source
from tasks.records import Row
from tasks.task import Conversation, TaskError, check_alternation


class SmolTalk(HubTask):
    """``split`` is "train" (460 thousand conversations) or "test" (24 thousand). A system message may come first."""

    name = "SmolTalk"
    splits = ("train", "test")

    def __init__(self, split: str, task_data: str | Path | None = None, **slicing):
        self.check_split(split)
        folders = ("smoltalk", "smol-smoltalk/data", "smol-smoltalk")
        super().__init__(
            Source("HuggingFaceTB/smol-smoltalk", "default", ("messages",), folders), split, task_data, **slicing
        )

    def conversation(self, row: Row) -> Conversation:
        reason = check_alternation(row["messages"], system=True)
        if reason is not None:
            raise TaskError(reason)
        return {"messages": row["messages"]}
