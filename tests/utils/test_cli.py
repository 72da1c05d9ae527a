"""Flags from a dataclass: every way to write them, every mistake named."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.utils import flags
from nanochat_jax.utils.flags import flag


@dataclass(frozen=True)
class Settings:
    depth: int = flag(20, "the number of layers")
    grad_clip: float = flag(1.0, "largest gradient norm")
    demo: bool = flag(False, "small defaults")
    resume: bool = flag(True, "resume an existing run", free=True)
    run_name: str = flag("", "name of the run", reference={"run": "it is --run_name here"})
    prompt: str = flag("", "text to complete", short="p")
    top_k: int | None = flag(None, "most likely tokens to draw from")
    remat: str = flag("none", "what to recompute", choices=("none", "mlp", "block"))
    out: Path = flag(Path("x"), "a folder")
    data: str = flag("", "a file", path=True)
    maybe: Path | None = flag(None, "a folder or none")


def parse(*argv) -> Settings:
    return flags.parse(Settings, argv)


def fails(capsys, *argv, settings: type = Settings) -> str:
    with pytest.raises(SystemExit) as stop:
        flags.parse(settings, argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
    return captured.err


TILDES = [
    ("~/x", "/home/ann/x"), ("~", "/home/ann"), ("~/", "/home/ann/"), ("a/~/x", "a/~/x"), ("./~x", "./~x"), ("", ""),
    ("~no-such-user/x", "~no-such-user/x"), ("/~/x", "/~/x"), ("~/~/x", "/home/ann/~/x"),
]  # fmt: skip


@pytest.mark.parametrize("given, meant", TILDES)
def test_paths_are_expanded_once_and_nothing_else_is(given, meant, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    for argv in ([f"--data={given}"], ["--data", given]):
        assert parse(*argv).data == meant
    assert parse(f"--out={given}").out == parse(f"--maybe={given}").maybe == Path(meant)
    assert parse(f"--run_name={given}", f"--prompt={given}").run_name == given
    assert parse("--maybe=none").maybe is None


@pytest.mark.parametrize(
    "argv, written",
    [
        (["-p", "--- What"], "-p='--- What'"),
        (["-p", "--", "--depth=3"], "-p=--"),
        (["--prompt", "--x"], "--prompt=--x"),
        (["--run-name", "--it's"], """--run-name='--it'"'"'s'"""),
        (["--depth", "--demo"], "--depth=--demo"),
    ],
)
def test_a_value_that_looks_like_a_flag_is_told_how_to_be_written(argv, written, capsys):
    assert fails(capsys, *argv).endswith(f"is written {written}\n")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--depth=12"], {"depth": 12}),
        (["--depth", "12"], {"depth": 12}),
        (["--depth=1e3"], {"depth": 1000}),
        (["--depth=20000000000000000001"], {"depth": 20000000000000000001}),
        (["--grad_clip=1"], {"grad_clip": 1.0}),  # an integer is refused for a float by the reference
        (["--grad_clip", "1e-3"], {"grad_clip": 0.001}),
        (["--grad-clip=-2"], {"grad_clip": -2.0}),
        (["--demo"], {"demo": True}),
        (["--demo", "true", "--depth=3"], {"demo": True, "depth": 3}),
        (["--demo", "--depth=3"], {"demo": True, "depth": 3}),
        (["--resume=False"], {"resume": False}),
        (["--resume", "no"], {"resume": False}),
        (["--run-name=a=b,c"], {"run_name": "a=b,c"}),  # the reference dies on a second "="
        (["--run_name="], {"run_name": ""}),
        (["-p", "- to be -"], {"prompt": "- to be -"}),
        (["--prompt=--x"], {"prompt": "--x"}),
        (["--top_k=5"], {"top_k": 5}),
        (["--top_k=None"], {"top_k": None}),
        (["--out=a/b"], {"out": Path("a/b")}),
        (["--depth=1", "--depth=2"], {"depth": 2}),
    ],
)
def test_ways_to_write_a_flag(argv, expected):
    assert parse(*argv) == Settings(**expected)
    for name, value in expected.items():
        assert type(getattr(parse(*argv), name)) is type(value)


def test_only_overrides_are_printed(capsys):
    assert parse() == Settings() and flags.parse(Settings, ["--depth=12"], echo=False).depth == 12
    assert capsys.readouterr().out == ""
    parse("--depth=12", "--grad_clip=1", "--run_name=x")
    assert capsys.readouterr().out == "--depth = 12 (default 20)\n--run_name = 'x' (default '')\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--dpeth=12"], "--depth"),  # the nearest name
        (["--grad-clp", "1"], "--grad_clip"),
        (["--run=d20"], "--run_name"),  # the reference's name
        (["--xyz"], "--xyz"),
        (["--depth=1.5"], "--depth"),
        (["--depth=inf"], "--depth"),
        (["--depth=twelve"], "'twelve'"),
        (["--grad_clip=big"], "--grad_clip"),
        (["--grad_clip=nan"], "--grad_clip"),
        (["--demo=maybe"], "'maybe'"),
        (["--top_k=x"], "--top_k"),
        (["--remat=all"], "none, mlp, block"),
        (["--depth"], "--depth=INT"),
        (["--depth", "--demo"], "--depth"),
        (["config.py"], "'config.py'"),
        (["--demo", "config.py"], "'config.py'"),
        (["-x"], "'-x'"),
        (["--"], "'--'"),
    ],
)
def test_mistakes(capsys, argv, words):
    assert words in fails(capsys, *argv)


def test_required_and_impossible_flags(capsys):
    @dataclass
    class Needs:
        path: str = dataclasses.field(metadata={"help": "a file"})

    assert "--path=STR" in fails(capsys, settings=Needs)
    assert flags.parse(Needs, ["--path=a"]).path == "a"

    @dataclass
    class Bad:
        sizes: list[int] = dataclasses.field(default_factory=list)

    with pytest.raises(TypeError, match="Bad.sizes"):  # a slip of the programmer
        flags.parse(Bad, [])


def test_help_names_every_flag_with_type_text_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse(Settings, ["--depth=3", "--help"], "Trains a model.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Trains a model.")
    for field in dataclasses.fields(Settings):
        assert f"--{field.name}=" in text and field.metadata["help"] in text
    assert "(default 20)" in text and "-p, --prompt=STR" in text and "none|mlp|block" in text


def test_is_set_agrees_with_parse():
    for argv in (
        [],
        ["--demo"],
        ["--demo=False"],
        ["--demo", "False"],
        ["--demo", "--depth=3"],
        ["--demo", "--demo=0"],
    ):
        assert flags.is_set("demo", argv) is parse(*argv).demo
    assert not flags.is_set("demo", ["--run_name", "demo"]) and not flags.is_set("demo", ["--demonstrate"])


@given(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text())
def test_round_trip(depth, clip, demo, name):
    argv = [f"--depth={depth}", f"--grad_clip={clip!r}", f"--demo={demo}", f"--run_name={name}"]
    result = flags.parse(Settings, argv, echo=False)
    assert (result.depth, result.grad_clip, result.demo, result.run_name) == (depth, clip, demo, name)


def test_an_instance_gives_the_defaults(capsys):
    demo = Settings(depth=4, demo=True, remat="mlp")
    assert flags.parse(demo, ["--depth=5"]) == dataclasses.replace(demo, depth=5)
    assert capsys.readouterr().out == "--depth = 5 (default 4)\n"
    with pytest.raises(SystemExit):
        flags.parse(demo, ["--help"])
    assert "(default 4)" in capsys.readouterr().out


@dataclass(frozen=True)
class Later(Settings):
    """Later stages."""

    length: int = flag(8, "tokens", unused_by=("rl",))
    kl: float = flag(0.0, "a penalty")


def test_help_groups_flags_by_the_class_that_declares_them(capsys):
    with pytest.raises(SystemExit):
        flags.parse(Later, ["--help"], "Trains.")
    out = capsys.readouterr().out
    assert out.index("Trains.") < out.index("Later stages.") < out.index("--length=") < out.index("--depth=")


def test_flags_that_a_stage_does_not_use_are_accepted_and_named(capsys):
    assert flags.parse(Later, ["--length=4", "--kl=1"], stage="rl").length == 4
    assert capsys.readouterr().out.splitlines()[-1] == "not used by rl: --length"
    assert flags.parse(Later, ["--length=4"], stage="sft").length == 4
    assert "not used" not in capsys.readouterr().out
    for stage in ("rl", "sft"):
        with pytest.raises(SystemExit):
            flags.parse(Later, ["--help"], stage=stage)
        listed, apart, named = capsys.readouterr().out.partition("not used here")
        assert ("--length=" in listed) == (stage == "sft") and bool(apart) == ("--length" in named) == (stage == "rl")
