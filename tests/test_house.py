"""The order of the house: which room may import which. Sources are parsed and never run; what a function imports when
it is called, and what only a type checker sees, counts as well.

A rule is a function from the house to what breaks it. A *room* is a module or a folder right below nanochat_jax/, or
one of the folders beside it.
"""

import ast
import graphlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("nanochat_jax", "tasks", "scripts", "dev", "benchmarks")
MAX_LINES = 450

# The model, what trains it and what decodes it: these know nothing of who uses them.
CORE = {
    "attention", "auto_batch", "bpb", "cpu_kernels", "dealing", "decode", "engine", "gpt", "kv_cache", "loss", "matmul",
    "muon", "optim", "parallel", "plan", "reference", "request", "rollouts", "samples", "sampling", "schedules",
    "sharding", "slot_programs", "slot_table", "train", "train_step",
}  # fmt: skip
USERS = {"evals", "interchange", "models", "planner", "report", "serve", "stages", "terminal"}
# Text in, text out: these must start without JAX.
TEXT = {
    "answers", "cards", "cli", "conversation", "errors", "identity", "identity_phrases", "paths", "progress", "sandbox",
    "sandbox_child", "stock_encodings", "tokenizer", "tools", "web", "world",
}  # fmt: skip
JAX = {"flax", "grain", "jax", "jaxlib", "optax", "orbax"}
# What data sets need: raw files and whence they come, a place for them, the demo world, a place to run programs in.
OF_TASKS = ("data.fetch", "data.readers", "data.shards", "paths", "utils.errors", "sandbox", "web", "world")
RUN_WHAT_THEY_READ = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Stages load one of their own by name, the check of an export loads whatever libraries there are.
BY_NAME = {"nanochat_jax.stages.main", "nanochat_jax.convert.verify"}


@dataclass(frozen=True)
class Source:
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> list[str]:
        """All that is imported, anywhere: "a.b" for `import a.b`, "a.b.c" for `from a.b import c`."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = "." * node.level + (node.module or "")
                found += [f"{start}.{alias.name}" for alias in node.names]
        return found


House = dict[str, Source]


def read_house() -> House:
    """The source of every module by its dotted name."""
    house = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            house[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = Source(path.read_text("utf-8"))
    return house


def room(name: str) -> str:
    """ "gpt" for nanochat_jax.model.gpt, "data" for nanochat_jax.data.build_rows, "tasks" for tasks.demo_world."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "nanochat_jax" and rest else first


def module_of(house: House, imported: str) -> str | None:
    """The module of the house that an import means; None for one of a library."""
    while imported and imported not in house:
        imported = imported.rpartition(".")[0]
    return imported or None


def graph(house: House) -> dict[str, set[str]]:
    """Module -> the modules of the house that it imports."""
    found = {}
    for name, source in house.items():
        found[name] = {m for i in source.imports if (m := module_of(house, i)) is not None} - {name}
    return found


def reached(house: House, edges: dict[str, set[str]], start: str) -> Iterator[tuple[str, str]]:
    """(name, by which module) of all that comes with `start`, by whatever way: modules, and names of libraries."""
    seen, waiting = {start}, [start]
    while waiting:
        name = waiting.pop()
        parents = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}  # their __init__ runs first
        for target in (edges[name] | parents & house.keys()) - seen:
            seen.add(target)
            waiting.append(target)
            yield target, name
        for imported in house[name].imports:
            if module_of(house, imported) is None:
                yield imported, name


def in_rooms(house: House, rooms: set[str]) -> list[str]:
    found = [name for name in house if name.startswith("nanochat_jax.") and room(name) in rooms]
    assert {room(name) for name in found} == rooms, "a room has another name now"
    return found


# --- the rules --------------------------------------------------------------------------------------------------------


def scripts_hold_no_logic(house: House) -> list[str]:
    """A script is its description, two imports, and one call."""
    wrong = []
    for name, source in house.items():
        if not name.startswith("scripts."):
            continue
        body = source.tree.body
        known = all(i == "sys" or i.startswith("nanochat_jax.") for i in source.imports)
        shape = [type(node) for node in body] == [ast.Expr, ast.Import, ast.ImportFrom, ast.If]
        call = ast.unparse(body[-1]) == "if __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))"
        if not (known and shape and call and len(source.text.splitlines()) <= 10):
            wrong.append(name)
    return wrong


def imports_are_absolute(house: House) -> list[str]:
    return [f"{name}: {i}" for name, source in house.items() for i in source.imports if i.startswith(".")]


def nobody_imports_the_faces(house: House) -> list[str]:
    """scripts, dev, benchmarks and tests use the house, not it them, nor they each other."""
    faces = {"scripts", "tests", "dev", "benchmarks"}
    wrong = []
    for name, source in house.items():
        own = {room(name)} - {"scripts"}
        wrong += [f"{name} imports {i}" for i in source.imports if i.partition(".")[0] in faces - own]
    return wrong


def _circles(edges: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def no_circle_of_modules(house: House) -> list[str]:
    return _circles(graph(house))


def no_circle_of_rooms(house: House) -> list[str]:
    rooms = defaultdict(set)
    for name, targets in graph(house).items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    return _circles(rooms)


def the_core_knows_none_of_its_users(house: House) -> list[str]:
    edges = graph(house)
    return [
        f"{name} reaches {target} by {by}"
        for name in in_rooms(house, CORE)
        for target, by in reached(house, edges, name)
        if target.startswith("nanochat_jax.") and room(target) in USERS
    ]


def text_needs_no_jax(house: House) -> list[str]:
    edges = graph(house)
    return [
        f"{name} reaches {target} by {by}"
        for name in in_rooms(house, TEXT)
        for target, by in reached(house, edges, name)
        if target.partition(".")[0] in JAX
    ]


def muon_is_useful_elsewhere(house: House) -> list[str]:
    return sorted(graph(house)["nanochat_jax.training.muon"])


def tasks_import_little(house: House) -> list[str]:
    allowed = tuple(f"nanochat_jax.{name}" for name in OF_TASKS)
    return [
        f"{name} imports {target}"
        for name, targets in graph(house).items()
        if room(name) == "tasks"
        for target in targets
        if room(target) != "tasks" and not f"{target}.".startswith(tuple(f"{a}." for a in allowed))
    ]


def nothing_that_is_read_is_run(house: House) -> list[str]:
    """No pickle and its like; only the reader of the reference's files subclasses the standard library's unpickler."""
    wrong = []
    for name, source in house.items():
        runs = [i for i in source.imports if i.partition(".")[0] in RUN_WHAT_THEY_READ]
        if name == "nanochat_jax.convert.pt_files":
            runs = re.findall(r"pickle\.(?:loads?|Unpickler)\(", source.text)
        wrong += [f"{name}: {i}" for i in runs]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    wrong.append(f"{name}, line {node.value.lineno}: allow_pickle")
    return wrong


def imports_by_name_are_known(house: House) -> list[str]:
    """What is imported by a name that is computed escapes all other rules."""
    calls = ("import_module", "__import__")
    return [
        name
        for name, source in house.items()
        if name not in BY_NAME and room(name) != "benchmarks"
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Name) and node.id in calls) or (isinstance(node, ast.Attribute) and node.attr in calls)
    ]


def one_table_of_what_lives_where(house: House) -> list[str]:
    """PartitionSpecs are written in sharding.py alone."""
    return [
        name
        for name, source in house.items()
        if name != "nanochat_jax.parallel.sharding"
        if any(i.endswith(".PartitionSpec") for i in source.imports)
        or any(isinstance(node, ast.Attribute) and node.attr == "PartitionSpec" for node in ast.walk(source.tree))
    ]


def files_are_short(house: House) -> list[str]:
    lines = {name: len(source.text.splitlines()) for name, source in house.items() if name.startswith("nanochat_jax")}
    return [f"{name} has {n} lines" for name, n in lines.items() if n > MAX_LINES]


def the_readme_names_every_room(house: House) -> list[str]:
    layout = (ROOT / "README.md").read_text("utf-8").partition("## The layout")[2].split("```")[1]
    named = set(re.findall(r"[\w.]+(?:\.py|/)", layout))
    parts = [name.split(".") for name in house if name.startswith("nanochat_jax.")]
    folders = {part[1] for part in parts if len(part) > 2}
    return sorted({f"{part[1]}/" if part[1] in folders else f"{part[1]}.py" for part in parts} - named)


RULES = [
    scripts_hold_no_logic, imports_are_absolute, nobody_imports_the_faces, no_circle_of_modules, no_circle_of_rooms,
    the_core_knows_none_of_its_users, text_needs_no_jax, muon_is_useful_elsewhere, tasks_import_little,
    nothing_that_is_read_is_run, imports_by_name_are_known, one_table_of_what_lives_where, files_are_short,
    the_readme_names_every_room,
]  # fmt: skip
HOUSE = read_house()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house(rule):
    assert rule(HOUSE) == []


def test_all_of_it_is_read():
    assert {name.partition(".")[0] for name in HOUSE} == set(FOLDERS)
    assert {
        "nanochat_jax",
        "nanochat_jax.model.gpt",
        "nanochat_jax.demo_world.chat.kinds",
        "tasks.hub",
    } <= HOUSE.keys()


# (rule, module, what is added to it)
BREACHES = [
    (scripts_hold_no_logic, "scripts.chat", "print('done')"),
    (
        scripts_hold_no_logic,
        "scripts.new",
        '"""Runs."""\nimport sys\nfrom nanochat_jax.report.list_runs import main\nmain()',
    ),
    (imports_are_absolute, "nanochat_jax.model.loss", "from . import gpt"),
    (nobody_imports_the_faces, "nanochat_jax.utils.flags", "def f():\n    from scripts import train"),
    (nobody_imports_the_faces, "nanochat_jax.inference.engine", "import tests.conftest"),
    (nobody_imports_the_faces, "dev.repackage_data", "from benchmarks import streams"),
    (nobody_imports_the_faces, "scripts.chat", "import scripts.serve"),
    (no_circle_of_modules, "nanochat_jax.data.documents", "import nanochat_jax.data.build_rows"),
    (no_circle_of_modules, "nanochat_jax.model.gpt", "def f():\n    from nanochat_jax import engine"),
    (no_circle_of_rooms, "nanochat_jax.data.web_pages", "import tasks.hub"),
    (no_circle_of_rooms, "nanochat_jax.evals.results", "if TYPE_CHECKING:\n    from nanochat_jax.stages import base"),
    (the_core_knows_none_of_its_users, "nanochat_jax.inference.decode", "from nanochat_jax.serve import schemas"),
    (
        the_core_knows_none_of_its_users,
        "nanochat_jax.hardware.gpus",
        "import nanochat_jax.evals.stats",
    ),  # gpt: devices: cards
    (text_needs_no_jax, "nanochat_jax.text.chat_format", "def f():\n    import jax.numpy as jnp"),
    (text_needs_no_jax, "nanochat_jax.data.web", "from nanochat_jax import gpt"),
    (text_needs_no_jax, "nanochat_jax.demo_world", "import optax"),
    (muon_is_useful_elsewhere, "nanochat_jax.training.muon", "from nanochat_jax.model.gpt import Params"),
    (tasks_import_little, "tasks.gsm8k", "from nanochat_jax.data import rows"),
    (tasks_import_little, "tasks.task", "from nanochat_jax.text.tokenizer import Tokenizer"),
    (nothing_that_is_read_is_run, "nanochat_jax.runs.checkpoint", "def f():\n    import pickle"),
    (nothing_that_is_read_is_run, "nanochat_jax.convert.pt_files", "pickle.loads(data)"),
    (nothing_that_is_read_is_run, "nanochat_jax.training.replay", "np.load(path, allow_pickle=True)"),
    (imports_by_name_are_known, "nanochat_jax.evals.run", "import importlib\nimportlib.import_module('pickle')"),
    (one_table_of_what_lives_where, "nanochat_jax.training.step", "from jax.sharding import PartitionSpec as P"),
    (one_table_of_what_lives_where, "nanochat_jax.model.loss", "jax.sharding.PartitionSpec('data')"),
    (files_are_short, "nanochat_jax.demo_world.words", "x = 1\n" * MAX_LINES),
    (the_readme_names_every_room, "nanochat_jax.attic", ""),
    (the_readme_names_every_room, "nanochat_jax.attic.box", ""),
]


@pytest.mark.parametrize(("rule", "name", "more"), BREACHES)
def test_every_rule_can_be_broken(rule, name, more):
    old = HOUSE[name].text + "\n" if name in HOUSE else ""
    assert rule({**HOUSE, name: Source(old + more)})


def test_every_rule_has_a_breach():
    assert {rule for rule, *_ in BREACHES} == set(RULES)
