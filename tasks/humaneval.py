"""HumanEval: write a Python function from its signature and docstring; hidden tests decide.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code". A row is {prompt, canonical_solution, entry_point,
test}.
"""

import re
from pathlib import Path

from tasks.hub import HubTask, Source
from tasks.records import Row
from tasks.task import Conversation

_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(HubTask):
    """164 problems, all in the split "test".

    ``allow_unsafe_code`` lets ``evaluate`` run completions where the host cannot isolate them.
    """

    name = "HumanEval"
    eval_type = "generative"
    splits = ("test",)

    def __init__(
        self, split: str = "test", task_data: str | Path | None = None, allow_unsafe_code: bool = False, **slicing
    ):
        self.check_split(split)
        self.allow_unsafe_code = allow_unsafe_code
        columns = ("prompt", "canonical_solution", "entry_point", "test")
        source = Source("openai/openai_humaneval", "openai_humaneval", columns, ("humaneval", "openai_humaneval"))
        super().__init__(source, split, task_data, **slicing)

    def conversation(self, row: Row) -> Conversation:
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion's program passes the tests; it runs in the sandbox, for a few seconds at most.

        Raises sandbox.SandboxUnavailable where code cannot be isolated and running it all the same was not allowed.
        """
        from tasks.sandbox import execute_code

        return execute_code(program(conversation, completion), allow_unsafe=self.allow_unsafe_code).success


def program(conversation: Conversation, completion: str) -> str:
    """The program that succeeds exactly if the completion is right.

    The prompt lends only its leading imports: a completion must be a complete function, not the rest of one.
    """
    imports = extract_imports(conversation["messages"][0]["content"])
    code = extract_program(completion)
    return f"{imports}\n\n{code}\n\n{conversation['test']}\ncheck({conversation['entry_point']})"


def extract_imports(prompt: str) -> str:
    """The import lines before the first line of other code, without their indentation."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


def extract_program(completion: str) -> str:
    """The contents of the first closed Markdown fence (plain or python), else the full completion; stripped."""
    found = _FENCED.search(completion)
    return (found.group(1) if found else completion).strip()
