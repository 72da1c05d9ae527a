"""What may import what, and other rules of the source tree. Sources are parsed and never run; what a function imports
when it is called, and what only a type checker sees, counts as well.

A rule is a function from the sources to a list of violations. Folders are those below nanochat_jax/ and beside it.
"""

import ast
import functools
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

# A folder imports only folders with lower numbers, none of its own number but itself.
LAYERS = {
    "utils": 1,
    "hardware": 2, "text": 2,
    "model": 3, "demo_world": 3,
    "parallel": 4, "data": 4,
    "tasks": 5, "runs": 5, "inference": 5,
    "training": 6, "evals": 6, "serve": 6, "terminal": 6,
    "planner": 7, "report": 7,
    "stages": 8, "convert": 8,
    "scripts": 9, "dev": 9, "benchmarks": 9,
}  # fmt: skip
# These must start without JAX.
WITHOUT_JAX = {"utils", "text", "demo_world", "tasks"}
JAX = {"flax", "grain", "jax", "jaxlib", "optax", "orbax"}
# What data sets may use.
OF_TASKS = ("utils", "text", "demo_world", "data.fetch", "data.hub", "data.readers", "data.shards")
UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
READS_PICKLES = "nanochat_jax.convert.pt_files"
# Stages and tasks load one of their own by name, the check of an export loads whatever libraries there are, the package
# itself its public names when they are first used.
BY_NAME = {"nanochat_jax", "nanochat_jax.stages.main", "nanochat_jax.convert.verify", "tasks"}


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


Sources = dict[str, Source]


def read_sources() -> Sources:
    """The source of every module by its dotted name."""
    sources = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = Source(path.read_text("utf-8"))
    return sources


def folder_of(name: str) -> str:
    """ "model" for nanochat_jax.model.gpt, "tasks" for tasks.arc, "nanochat_jax" for the package itself."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "nanochat_jax" and rest else first


def module_of(sources: Sources, imported: str) -> str | None:
    """The module of ours that an import means; None for one of a library."""
    while imported and imported not in sources:
        imported = imported.rpartition(".")[0]
    return imported or None


def graph(sources: Sources) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    found = {}
    for name, source in sources.items():
        found[name] = {m for i in source.imports if (m := module_of(sources, i)) is not None} - {name}
    return found


def reached(sources: Sources, edges: dict[str, set[str]], start: str) -> Iterator[tuple[str, str]]:
    """(name, by which module) of all that comes with `start`, by whatever way: modules, and names of libraries."""
    seen, waiting = {start}, [start]
    while waiting:
        name = waiting.pop()
        parents = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}  # their __init__ runs first
        # not the package itself, which imports nothing before it is asked for a name
        for target in (edges[name] | parents & sources.keys()) - seen - {"nanochat_jax"}:
            seen.add(target)
            waiting.append(target)
            yield target, name
        for imported in sources[name].imports:
            if module_of(sources, imported) is None:
                yield imported, name


# --- the rules --------------------------------------------------------------------------------------------------------


def scripts_hold_no_logic(sources: Sources) -> list[str]:
    """A script is its description, two imports, and one call."""
    wrong = []
    for name, source in sources.items():
        if not name.startswith("scripts."):
            continue
        body = source.tree.body
        known = all(i == "sys" or i.startswith("nanochat_jax.") for i in source.imports)
        shape = [type(node) for node in body] == [ast.Expr, ast.Import, ast.ImportFrom, ast.If]
        call = ast.unparse(body[-1]) == "if __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))"
        if not (known and shape and call and len(source.text.splitlines()) <= 10):
            wrong.append(name)
    return wrong


def imports_are_absolute(sources: Sources) -> list[str]:
    return [f"{name}: {i}" for name, source in sources.items() for i in source.imports if i.startswith(".")]


def nothing_imports_entry_points(sources: Sources) -> list[str]:
    """scripts, dev, benchmarks and tests use the packages, not the other way round, and none of them another."""
    entry_points = {"scripts", "tests", "dev", "benchmarks"}
    wrong = []
    for name, source in sources.items():
        own = {folder_of(name)} - {"scripts"}
        wrong += [f"{name} imports {i}" for i in source.imports if i.partition(".")[0] in entry_points - own]
    return wrong


def no_circle_of_modules(sources: Sources) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph(sources)).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def folders_import_lower_ones(sources: Sources) -> list[str]:
    known = {*LAYERS, "nanochat_jax"}
    wrong = [f"{name} is in no folder of LAYERS" for name in sources if folder_of(name) not in known]
    for name, targets in graph(sources).items():
        above = folder_of(name)
        for target in targets:
            below = folder_of(target)
            # the package itself imports nothing before it is asked
            if below not in (above, "nanochat_jax") and LAYERS.get(below, 0) >= LAYERS.get(above, 99):
                wrong.append(f"{name} imports {target}")
    return wrong


def text_needs_no_jax(sources: Sources) -> list[str]:
    edges = graph(sources)
    return [
        f"{name} reaches {target} by {by}"
        for name in sources
        if folder_of(name) in WITHOUT_JAX
        for target, by in reached(sources, edges, name)
        if target.partition(".")[0] in JAX
    ]


def muon_is_useful_elsewhere(sources: Sources) -> list[str]:
    return sorted(graph(sources)["nanochat_jax.training.muon"])


def tasks_import_little(sources: Sources) -> list[str]:
    allowed = tuple(f"nanochat_jax.{name}." for name in OF_TASKS)
    return [
        f"{name} imports {target}"
        for name, targets in graph(sources).items()
        if folder_of(name) == "tasks"
        for target in targets
        if folder_of(target) != "tasks" and not f"{target}.".startswith(allowed)
    ]


def nothing_is_unpickled(sources: Sources) -> list[str]:
    """Loading a pickle runs it. Only the reader of the reference's files may, by an unpickler that has a whitelist."""
    wrong = []
    for name, source in sources.items():
        used = [i for i in source.imports if i.partition(".")[0] in UNPICKLERS]
        if name == READS_PICKLES:
            used = re.findall(r"pickle\.(?:loads?|Unpickler)\(", source.text)
        wrong += [f"{name}: {i}" for i in used]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    wrong.append(f"{name}, line {node.value.lineno}: allow_pickle")
    return wrong


def imports_by_name_are_known(sources: Sources) -> list[str]:
    """What is imported by a name that is computed escapes all other rules."""
    calls = ("import_module", "__import__")
    return [
        name
        for name, source in sources.items()
        if name not in BY_NAME and folder_of(name) != "benchmarks"
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Name) and node.id in calls) or (isinstance(node, ast.Attribute) and node.attr in calls)
    ]


def partition_specs_are_in_one_file(sources: Sources) -> list[str]:
    return [
        name
        for name, source in sources.items()
        if name != "nanochat_jax.parallel.sharding"
        if any(i.endswith(".PartitionSpec") for i in source.imports)
        or any(isinstance(node, ast.Attribute) and node.attr == "PartitionSpec" for node in ast.walk(source.tree))
    ]


def files_are_short(sources: Sources) -> list[str]:
    lines = {name: len(source.text.splitlines()) for name, source in sources.items()}
    return [f"{name} has {n} lines" for name, n in lines.items() if n > MAX_LINES]


def class_names_are_unique(sources: Sources) -> list[str]:
    """Of the classes that others may use: one name, one thing."""
    where = defaultdict(list)
    for name, source in sources.items():
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(name)
    return [f"{name}: {', '.join(modules)}" for name, modules in where.items() if len(modules) > 1]


def the_readme_names_every_folder(sources: Sources) -> list[str]:
    layout = (ROOT / "README.md").read_text("utf-8").partition("## Layout")[2].split("```")[1]
    named = set(re.findall(r"\w+(?=/)", layout))
    return sorted({folder_of(name) for name in sources} - named)


RULES = [
    scripts_hold_no_logic, imports_are_absolute, nothing_imports_entry_points, no_circle_of_modules,
    folders_import_lower_ones, text_needs_no_jax, muon_is_useful_elsewhere, tasks_import_little, nothing_is_unpickled,
    imports_by_name_are_known, partition_specs_are_in_one_file, files_are_short, class_names_are_unique,
    the_readme_names_every_folder,
]  # fmt: skip
SOURCES = read_sources()


@functools.cache
def found(rule) -> list[str]:
    return rule(SOURCES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rules_hold(rule):
    assert found(rule) == []


def test_all_sources_are_read():
    assert {name.partition(".")[0] for name in SOURCES} == set(FOLDERS)
    assert {"nanochat_jax", "nanochat_jax.model.gpt", "tasks.hub"} <= SOURCES.keys()
    assert {folder_of(name) for name in SOURCES} == {*LAYERS, "nanochat_jax"}
    assert {rule for rule, *_ in VIOLATIONS} == set(RULES)


LIST_RUNS = "import sys\nfrom nanochat_jax.report.list_runs import main\nmain()"
# (rule, module, what is added to it)
VIOLATIONS = [
    (scripts_hold_no_logic, "scripts.chat", "print('done')"),
    (scripts_hold_no_logic, "scripts.new", f'"""Runs."""\n{LIST_RUNS}'),
    (imports_are_absolute, "nanochat_jax.model.loss", "from . import gpt"),
    (nothing_imports_entry_points, "nanochat_jax.utils.flags", "def f():\n    from scripts import train"),
    (nothing_imports_entry_points, "nanochat_jax.inference.engine", "import tests.conftest"),
    (nothing_imports_entry_points, "dev.repackage_data", "from benchmarks import streams"),
    (nothing_imports_entry_points, "scripts.chat", "import scripts.serve"),
    (no_circle_of_modules, "nanochat_jax.data.documents", "import nanochat_jax.data.build_rows"),
    (no_circle_of_modules, "nanochat_jax.model.gpt", "def f():\n    from nanochat_jax.inference import engine"),
    (folders_import_lower_ones, "nanochat_jax.data.readers", "import tasks.hub"),
    (folders_import_lower_ones, "nanochat_jax.evals.results", "if TYPE_CHECKING:\n    import nanochat_jax.stages.base"),
    (folders_import_lower_ones, "nanochat_jax.training.step", "from nanochat_jax.evals import bpb"),  # its own number
    (folders_import_lower_ones, "nanochat_jax.attic.box", ""),
    (text_needs_no_jax, "nanochat_jax.text.chat_format", "def f():\n    import jax.numpy as jnp"),
    (text_needs_no_jax, "nanochat_jax.data.readers", "from nanochat_jax.model import gpt"),  # which tasks import
    (text_needs_no_jax, "nanochat_jax.demo_world", "import optax"),
    (muon_is_useful_elsewhere, "nanochat_jax.training.muon", "from nanochat_jax.model.gpt import Params"),
    (tasks_import_little, "tasks.gsm8k", "from nanochat_jax.data import build_rows"),
    (tasks_import_little, "tasks.task", "from nanochat_jax.hardware import devices"),
    (nothing_is_unpickled, "nanochat_jax.runs.checkpoint", "def f():\n    import pickle"),
    (nothing_is_unpickled, "nanochat_jax.convert.pt_files", "pickle.loads(data)"),
    (nothing_is_unpickled, "nanochat_jax.training.replay", "np.load(path, allow_pickle=True)"),
    (imports_by_name_are_known, "nanochat_jax.evals.run", "import importlib\nimportlib.import_module('pickle')"),
    (partition_specs_are_in_one_file, "nanochat_jax.training.step", "from jax.sharding import PartitionSpec as P"),
    (partition_specs_are_in_one_file, "nanochat_jax.model.loss", "jax.sharding.PartitionSpec('data')"),
    (files_are_short, "nanochat_jax.demo_world.lexicon", "x = 1\n" * MAX_LINES),
    (class_names_are_unique, "nanochat_jax.model.loss", "class Engine:\n    pass"),
    (the_readme_names_every_folder, "nanochat_jax.attic.box", ""),
]


@pytest.mark.parametrize(("rule", "name", "more"), VIOLATIONS)
def test_every_rule_can_be_violated(rule, name, more):
    old = SOURCES[name].text + "\n" if name in SOURCES else ""
    assert set(rule({**SOURCES, name: Source(old + more)})) > set(found(rule))
