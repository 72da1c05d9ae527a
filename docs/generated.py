"""Pages of the reference that are made from the code whenever the book is built."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
STAGES = ("base", "mid", "sft", "rl")
DEPTHS = (8, 12, 16, 20, 24)
# what the table of cards shows: (card, how many)
NODES = [
    *((card, 1) for card in ("rtx4060", "rtx3060", "rtx3080", "rtx4070", "rtx4080", "rtx3090", "rtx4090", "rtx5090")),
    *((card, 1) for card in ("l4", "a10g", "l40s", "a100-80", "h100")),
    ("h100", 8),
]


def write(folder: Path) -> None:
    """Writes commands.md, http.md and cards.md, which pages of reference/ include."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("commands.md", _commands()), ("http.md", _http()), ("cards.md", _cards())):
        path = folder / name
        if not path.exists() or path.read_text("utf-8") != text:  # an unchanged page is not read again
            path.write_text(text, "utf-8")


def _commands() -> str:
    """What every command of scripts/ says of itself."""
    names = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")
    commands = [(name,) for name in names if name != "train"] + [("train", f"--stage={stage}") for stage in STAGES]
    with ThreadPoolExecutor(2) as pool:
        helps = list(pool.map(_help, commands))
    titled = zip(commands, helps, strict=True)
    return "\n".join(f"## {' '.join(command)}\n\n```text\n{text}```\n" for command, text in titled)


def _help(command: tuple[str, ...]) -> str:
    arguments = [sys.executable, "-m", f"scripts.{command[0]}", *command[1:], "--help"]
    env = {**os.environ, "COLUMNS": "88"}
    return subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def _http() -> str:
    """Every endpoint of the server, from its OpenAPI description."""
    from nanochat_jax.serve.app import create_app

    worker = SimpleNamespace(metrics=SimpleNamespace(request=None))  # nothing is served
    schema = create_app(worker).openapi()  # type: ignore[arg-type]
    sections = []
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            text = about.get("description") or about.get("summary", "")
            sections.append(f"## {method.upper()} {path}\n\n{text}\n{_fields(schema, about)}")
    return "\n".join(sections)


def _fields(schema: dict, about: dict) -> str:
    """The fields of an endpoint's body, as a table; nothing where it takes none."""
    body = about.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" not in body:
        return ""
    model = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    required = model.get("required", [])
    rows = ["", "| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model["properties"].items():
        default = "required" if name in required else f"`{field.get('default')}`"
        rows.append(f"| `{name}` | {_type(field)} | {default} | {field.get('description', '')} |")
    return "\n".join(rows) + "\n"


def _type(field: dict) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"]))
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return field.get("type", "any")


def _cards() -> str:
    """Pretraining by the modern recipe on each node and at each depth: hours, and rows a GPU."""
    from nanochat_jax.hardware.gpus import CARDS

    lines = [f"| cards | {' | '.join(f'd{depth}' for depth in DEPTHS)} |", "|---|" + "---|" * len(DEPTHS)]
    for card, count in NODES:
        name = f"{count} x {CARDS[card].name.removeprefix('NVIDIA ')}"
        lines.append(f"| {name} | {' | '.join(_fits(card, count, depth) for depth in DEPTHS)} |")
    return "\n".join(lines) + "\n"


def _fits(card: str, count: int, depth: int) -> str:
    """ "3.8 h (32 rows)": hours at the share of the peak that the plan assumes, by the memory formula."""
    from nanochat_jax.planner.main import PlanSettings, make

    for remat in ("none", "mlp", "block"):
        facts = make(PlanSettings(depth=depth, gpu=card, gpus=count, recipe="modern", remat=remat, compile=False))
        if rows := facts["device_batch_size"]:
            hours = facts["time"]["base_hours"]
            long = f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.0f} days"
            return f"{long} ({rows}{'' if remat == 'none' else f', {remat}'})"
    return "does not fit"
