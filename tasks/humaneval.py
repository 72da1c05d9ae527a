"""HumanEval: write a Python function from its signature and docstring; hidden tests decide.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code". A row is {prompt, canonical_solution, entry_point,
test}.
"""

import re
from pathlib import Path

from tasks.hub import HubTask, Source
from tasks.programs import assembled, find_program, prelude
from tasks.records import Row
from tasks.task import STRICT, Conversation, check_texts

COLUMNS = ("prompt", "canonical_solution", "entry_point", "test")

_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(HubTask):
    """164 problems, all in the split "test".

    ``allow_unsafe_code`` lets ``evaluate`` run completions where the host cannot isolate them. ``strict`` takes the
    program from the completion as the reference does; else it is found in any wrapping (``tasks/programs.py``).
    """

    name = "HumanEval"
    eval_type = "generative"
    splits = ("test",)

    def __init__(
        self,
        split: str = "test",
        task_data: str | Path | None = None,
        allow_unsafe_code: bool = False,
        strict: bool = False,
        **slicing,
    ):
        self.check_split(split)
        self.allow_unsafe_code, self.strict = allow_unsafe_code, strict
        self.judge = STRICT if strict else "code in any wrapping"
        source = Source("openai/openai_humaneval", "openai_humaneval", COLUMNS, ("humaneval", "openai_humaneval"))
        super().__init__(source, split, task_data, **slicing)

    def conversation(self, row: Row) -> Conversation:
        check_texts(**{name: row[name] for name in COLUMNS})
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

        code = program(conversation, completion, self.strict)
        return execute_code(code, allow_unsafe=self.allow_unsafe_code).success


def program(conversation: Conversation, completion: str, strict: bool = False) -> str:
    """The program that succeeds exactly if the completion is right, which must be a complete function, not the rest of
    one. The prompt lends what comes before its function; strict: as in the reference its leading imports only.
    """
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    test = f"{conversation['test']}\ncheck({entry_point})"
    if strict:
        return f"{extract_imports(prompt)}\n\n{extract_program(completion)}\n\n{test}"
    lent = prelude(prompt, entry_point)
    code = find_program(completion, entry_point)
    lent = extract_imports(prompt) if lent is None else lent
    return assembled(lent, extract_program(completion) if code is None else code, test)


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
    """The reference's: the contents of the first closed Markdown fence (plain or python), else the full completion;
    stripped."""
    found = _FENCED.search(completion)
    return (found.group(1) if found else completion).strip()
