"""Tries a server with the clients that people use: python -m dev.try_clients [--run=NAME]; see --help.

Their newest releases are installed into a folder of their own (which needs a network, and npm for the one of Node);
then the run is served, each client asks it what it usually asks, and one line says how each fared.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dev.make_images import server
from nanochat_jax.runs.checkpoint import find_run
from nanochat_jax.utils import errors
from nanochat_jax.utils.errors import UserError
from nanochat_jax.utils.flags import flag, parse

PACKAGES = ["openai", "langchain-openai", "llm", "lm-eval[api]"]
SECONDS = 300  # for one client

OPENAI_PYTHON = """
import sys
from openai import OpenAI
client, model = OpenAI(base_url=sys.argv[1], api_key="none"), sys.argv[2]
ask = [{"role": "user", "content": "Hello!"}]
whole = client.chat.completions.create(model=model, messages=ask, temperature=0, logprobs=True, top_logprobs=3)
parts = client.chat.completions.create(model=model, messages=ask, temperature=0, stream=True)
text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
assert text == whole.choices[0].message.content, (text, whole)
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3
assert client.responses.create(model=model, input="Hello!", temperature=0).output_text == text
with client.responses.stream(model=model, input="Hello!", temperature=0) as events:
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
"""

OPENAI_NODE = """
import assert from "node:assert";
import OpenAI from "openai";
const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none" });
const messages = [{ role: "user", content: "Hello!" }];
const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
let text = "";
for await (const part of await client.chat.completions.create({ model, messages, temperature: 0, stream: true }))
  text += part.choices[0]?.delta?.content ?? "";
assert.equal(text, whole.choices[0].message.content);
assert.equal((await client.responses.create({ model, input: "Hello!", temperature: 0 })).output_text, text);
"""

LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(base_url=sys.argv[1], api_key="none", model=sys.argv[2], temperature=0)
said = chat.invoke([("system", "Be brief."), ("human", "Hello!"), ("ai", "Hi."), ("human", "Who are you?")]).content
assert said and "".join(part.content for part in chat.stream(
    [("system", "Be brief."), ("human", "Hello!"), ("ai", "Hi."), ("human", "Who are you?")])) == said
"""

MULTIPLE_CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""

GENERATION = """
task: generation
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 16}
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: exact_match}]
"""

ITEMS = """
{"question": "A cow says", "choices": [" moo", " woof"], "answer": 0}
{"question": "Two and two is", "choices": [" seven", " four"], "answer": 1}
"""


class ClientsError(UserError, RuntimeError):
    """A client could not be installed, or one of them failed."""


@dataclass(frozen=True)
class ClientsSettings:
    """Flags."""

    run: str | None = flag(None, "the chat model to serve; default: the newest run")
    folder: str = flag("clients", "folder that the clients are installed into and work in", path=True)


def install(folder: Path) -> None:
    """Makes the environments below `folder`. Raises ClientsError."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = [[sys.executable, "-m", "venv", "env"], ["env/bin/pip", "install", "-q", "-U", *PACKAGES]]
    if shutil.which("npm"):
        commands.append(["npm", "install", "--silent", "--no-fund", "openai"])
    for command in commands:
        if subprocess.run(command, cwd=folder).returncode:
            raise ClientsError(f"failed in {folder}: {' '.join(command)}")
    for name, text in {
        "openai_python.py": OPENAI_PYTHON,
        "openai_node.mjs": OPENAI_NODE,
        "use_langchain.py": LANGCHAIN,
        "tasks/choice.yaml": MULTIPLE_CHOICE.replace("FOLDER", str(folder)),
        "tasks/generation.yaml": GENERATION.replace("FOLDER", str(folder)),
        "items.jsonl": ITEMS,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.lstrip())


def commands(address: str, model: str, folder: Path) -> dict[str, list[str]]:
    """What each client runs, by its name."""
    base = f"{address}/v1"
    (folder / "extra-openai-models.yaml").write_text(f"- {{model_id: served, model_name: {model}, api_base: {base}}}\n")

    def lm_eval(kind: str, task: str, *options: str) -> list[str]:
        arguments = f"base_url={base}/{kind},model={model},tokenized_requests=False,max_length=512"
        name = {"completions": "local-completions", "chat/completions": "local-chat-completions"}[kind]
        return ["env/bin/lm_eval", "run", "--model", name, "--model_args", arguments, "--tasks", task,
                "--include_path", "tasks", *options]  # fmt: skip

    found = {
        "openai for Python": ["env/bin/python", "openai_python.py", base, model],
        "LangChain": ["env/bin/python", "use_langchain.py", base, model],
        "llm": ["env/bin/llm", "-m", "served", "--key", "none", "Hello!"],
        "lm-eval, local-completions": lm_eval("completions", "choice"),
        "lm-eval, local-chat-completions": lm_eval("chat/completions", "generation", "--apply_chat_template"),
    }
    if (folder / "node_modules").is_dir():
        found["openai for Node"] = ["node", "openai_node.mjs", base, model]
    return found


def run(s: ClientsSettings) -> None:
    """Installs, serves, tries. Raises ClientsError with the last lines of those that failed."""
    folder = Path(s.folder).resolve()
    model = s.run or find_run().name
    install(folder)
    failed = []
    with server(model, 0.0) as address:
        for name, command in commands(address, model, folder).items():
            env = os.environ | {"LLM_USER_PATH": str(folder), "HF_HOME": str(folder / "hf")}
            done = subprocess.run(
                command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS
            )
            print(f"{name}: {'works' if done.returncode == 0 else 'FAILS'}", flush=True)
            if done.returncode:
                failed.append(f"{name}: {(done.stdout + done.stderr)[-1500:]}")
    if failed:
        raise ClientsError("\n\n".join(failed))


def main(argv: Sequence[str]) -> int:
    s = parse(ClientsSettings, argv, (__doc__ or "").split("\n\n")[0])
    return errors.exit_status(lambda: run(s))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
