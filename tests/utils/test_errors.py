"""One line for an error that names its remedy, a traceback for a bug: the rule, and every command that keeps it."""

import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from nanochat_jax.runs import checkpoint
from nanochat_jax.utils import errors, flags, paths
from nanochat_jax.utils.errors import exit_status, in_words, is_users
from tests import children

ROOT = Path(__file__).parents[2]


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def raise_(error: BaseException):
    raise error


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_users_errors_and_those_of_files_disks_and_networks_need_no_traceback():
    assert is_users(raised(lambda: checkpoint.run_dir("../x")))
    assert is_users(raised(lambda: tasks.load("no such task", "train")))
    assert is_users(raised(lambda: open("no such file")))
    assert is_users(raised(lambda: os.listdir(__file__)))
    assert is_users(OSError(errno.ENOSPC, "No space left on device"))
    assert is_users(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))
    assert not is_users(OSError(errno.EBADF, "Bad file descriptor")), "a file that the program has closed itself"
    assert not is_users(raised(lambda: flags.parse(int, ["x"])))  # pyright: ignore[reportArgumentType] - no dataclass


@pytest.mark.parametrize(
    "statement, users",
    [
        ("raise errors.UserError('fix it')", True),
        ("raise (\n    errors.InputError('fix it')\n)", True),
        ("try:\n    int('x')\nexcept ValueError as error:\n    raise errors.StorageError('fix it') from error", True),
        ("raise errors.UserError(int('x'))", False),  # before it could be raised
        ("raise ValueError('a contract of the program')", False),
        ("raise RuntimeError('a contract of the program')", False),
        ("raise OSError('of no file')", False),
        ("assert False", False),
    ],
)
def test_the_class_decides(statement, users):
    assert is_users(raised(lambda: exec(statement, {"errors": errors}))) is users


def test_every_exception_that_ends_a_command_is_a_user_error():
    """All classes named ...Error of the project, but those that never leave the module that raises them."""
    internal = {"api_errors.ApiError", "task.TaskIndexError"}
    missed = []
    for path in [*(ROOT / "nanochat_jax").rglob("*.py"), *(ROOT / "tasks").glob("*.py")]:
        for name, bases in re.findall(r"^class (\w+)\((.*(?:Error|Exception)\b.*)\):", path.read_text("utf-8"), re.M):
            if name.endswith("Error") and name != "UserError" and f"{path.stem}.{name}" not in internal:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                if not issubclass(getattr(importlib.import_module(module), name), errors.UserError):
                    missed.append(f"{module}.{name}({bases})")
    assert not missed


def test_a_file_comes_first_and_a_remedy_last():
    assert re.fullmatch("no such file: No such file or directory: .+", in_words(raised(lambda: open("no such file"))))
    assert re.fullmatch("No space left: .+", in_words(OSError(errno.ENOSPC, "No space left")))
    assert in_words(ValueError("as it is")) == "as it is" and in_words(RuntimeError()) == "RuntimeError"


def test_statuses(capsys):
    assert exit_status(lambda: None) == 0 and exit_status(lambda: 5) == 5
    assert capsys.readouterr().err == ""
    error = checkpoint.CheckpointError("put it right")
    assert exit_status(lambda: raise_(error)) == 1
    assert exit_status(lambda: raise_(error), {ValueError: 7, RuntimeError: 8}) == 8
    assert capsys.readouterr().err == 2 * "error: put it right\n"
    assert exit_status(lambda: raise_(KeyboardInterrupt()), stopped="enough") == 130
    assert capsys.readouterr().err == "enough\n"
    with pytest.raises(SystemExit) as stop:
        exit_status(lambda: flags.fail("this flag"))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: this flag\n"
    with pytest.raises(RuntimeError, match="a library's"):
        exit_status(lambda: raise_(RuntimeError("a library's")), {RuntimeError: 8})


# what fits into the buffer fails at the end only
@pytest.mark.parametrize("length, statuses, expected", [(1, "None", 141), (1_000_000, "{BrokenPipeError: 0}", 0)])
def test_output_that_nobody_reads_any_more_ends_quietly(length, statuses, expected):
    program = (
        f"from nanochat_jax.utils.errors import exit_status as e; exit(e(lambda: print('x' * {length}), {statuses}))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        done = children.run([sys.executable, "-c", program], cwd=ROOT, stdout=output, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (expected, b"")


def test_a_broken_pipe_that_is_not_the_output_is_a_bug():
    with pytest.raises(BrokenPipeError):
        exit_status(lambda: raise_(BrokenPipeError(errno.EPIPE, "Broken pipe")))


# --- every command ----------------------------------------------------------------------------------------------------

SCRIPTS = {p.stem: f"scripts.{p.stem}" for p in sorted((ROOT / "scripts").glob("*.py")) if p.stem != "__init__"}
COMMANDS = {**SCRIPTS, "bench_inference": "benchmarks.bench_inference", "download": "nanochat_jax.data.hub"}

# command, arguments ({} is the folder of the test), words of the one line. Nothing is on the disk.
MISSING = [
    ("train", ["--stage=sft", "--source=nope", "--device=cpu"], "nope"),
    ("train", ["--stage=base", "--device=cpu"], "tok_train"),
    ("eval", ["--run_name=nope", "--device=cpu"], "nope"),
    ("compare", ["nope", "other"], "nope"),
    ("models", ["--run=../nope"], "../nope"),
    ("replay", ["nope"], "nope"),
    ("miniseries", ["--name=nope"], "nope"),
    ("report", ["--runs=nope"], "nope"),
    ("serve", ["--run=nope", "--port=0", "--device=cpu"], "nope"),
    ("chat", ["--run=nope", "-p", "hello", "--device=cpu"], "nope"),
    ("bench_inference", ["--run=nope", "--device=cpu"], "nope"),
    ("plan", ["--gpu=nope"], "nope"),
    ("import_checkpoint", ["{}/nope"], "nope"),
    ("export", ["--to=hf", "{}/out", "--run=nope"], "nope"),
    ("tok_train", ["--data={}/nope"], "nope"),
    ("tok_eval", [], "scripts.tok_train"),
    ("download", ["-n", "1"], "NANOCHAT_OFFLINE"),
]

# The base directory holds damaged files: a run, a tokenizer, results, text, another project's checkpoint.
DAMAGED = [
    ("train", ["--stage=base", "--demo", "--device=cpu"], "tokenizer.json"),
    ("train", ["--stage=sft", "--demo", "--device=cpu"], "meta.json"),
    ("eval", ["--run_name=bad", "--device=cpu"], "meta.json"),
    ("compare", ["bad", "bad"], "x.json"),
    ("replay", ["bad", "3"], "incident.json"),
    ("report", [], "meta.json"),
    ("serve", ["--port=0", "--device=cpu"], "meta.json"),
    ("chat", ["-p", "hello", "--device=cpu"], "meta.json"),
    ("bench_inference", ["--run=bad", "--device=cpu"], "meta.json"),
    ("import_checkpoint", ["{}/model_000001.pt"], "model_000001.pt"),
    ("export", ["--to=hf", "{}/out", "--run=bad"], "meta.json"),
    ("tok_train", ["--data={}/text.parquet"], "text.parquet"),
    ("tok_eval", [], "tokenizer.json"),
    ("download", ["-n", "1", "--out={}/shards"], "shards.json"),
]

# What the command calls first of all.
FIRST = {
    "train": (["--stage=base"], "nanochat_jax.stages.base.run"),
    "eval": ([], "nanochat_jax.evals.run.run"),
    "compare": (["a", "b"], "nanochat_jax.evals.compare.load"),
    "models": ([], "nanochat_jax.report.list_runs.models"),
    "replay": (["a"], "nanochat_jax.training.replay.open_incident"),
    "miniseries": (["--name=a"], "nanochat_jax.stages.miniseries.run"),
    "report": ([], "nanochat_jax.report.main.write"),
    "serve": ([], "nanochat_jax.serve.main._listen"),
    "chat": (["-p", "hello"], "nanochat_jax.runs.checkpoint.find_run"),
    "bench_inference": ([], "benchmarks.bench_inference.bench"),
    "plan": ([], "nanochat_jax.planner.main.make"),
    "doctor": ([], "nanochat_jax.hardware.doctor.examine"),
    "import_checkpoint": (["x"], "nanochat_jax.convert.import_run.import_checkpoint"),
    "export": (["--to=hf", "x"], "nanochat_jax.convert.export.export"),
    "tok_train": ([], "nanochat_jax.stages.tokenizer.train_tokenizer"),
    "tok_eval": ([], "nanochat_jax.evals.compression.evaluate"),
    "download": ([], "nanochat_jax.data.hub.find_list"),
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    return tmp_path


def main(command: str, arguments: list[str], base: Path) -> int:
    return importlib.import_module(COMMANDS[command]).main([a.replace("{}", str(base)) for a in arguments])


def the_line(command: str, arguments: list[str], base: Path, capsys) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(command, arguments, base) == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    *_, last = shown.err.splitlines()
    assert last.startswith("error: ") and shown.err.count("error: ") == 1
    return last


def test_every_script_is_tried_here():
    assert set(COMMANDS) == set(FIRST) == {command for command, *_ in MISSING} | {"doctor"}  # which looks for nothing


@pytest.mark.parametrize("command, arguments, words", MISSING)
def test_what_is_missing_is_named(command, arguments, words, base, capsys):
    assert words in the_line(command, arguments, base, capsys)


@pytest.mark.parametrize("command, arguments, words", DAMAGED)
def test_what_is_damaged_is_named(command, arguments, words, base, capsys):
    run = base / "runs" / "bad"
    for path in (
        run / "checkpoints" / "00000007" / "meta.json",
        run / "incidents" / "00000003" / "incident.json",
        run / "evals" / "step-00000007" / "x.json",
        base / "tokenizer" / "tokenizer.json",
        base / "shards" / "shards.json",
        base / "text.parquet",
        base / "model_000001.pt",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"torn": \xff')
    assert words in the_line(command, arguments, base, capsys)


@pytest.mark.parametrize("command, arguments", [case[:2] for case in MISSING if case[0] != "plan"])
def test_a_base_directory_that_is_none(command, arguments, base, monkeypatch, capsys):
    (base / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    words = "nope" if command == "tok_train" else "is not a directory"  # whose text is looked for first
    assert words in the_line(command, arguments, base, capsys)


def no_home(monkeypatch):
    """As `env -i` with a user id that no file knows, the usual state of things in a container."""

    def unknown(*_):
        raise KeyError

    for name in ("HOME", "NANOCHAT_BASE_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("pwd.getpwnam", unknown)


OF_THE_BASE = [case[:2] for case in MISSING if case[0] not in ("plan", "tok_train", "import_checkpoint")]


@pytest.mark.parametrize("command, arguments", OF_THE_BASE)
def test_no_home_and_no_base_directory(command, arguments, base, monkeypatch, capsys):
    no_home(monkeypatch)
    assert "set NANOCHAT_BASE_DIR" in the_line(command, arguments, base, capsys)


@pytest.mark.parametrize("chosen", ["", "~", "~/x", "~nobody-of-this-name/x"])
def test_no_home(chosen, monkeypatch):
    no_home(monkeypatch)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", chosen)
    with pytest.raises(errors.StorageError, match="set NANOCHAT_BASE_DIR"):
        paths.base_dir()


@pytest.mark.parametrize("problem", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG])
def test_a_base_directory_that_cannot_be_made(problem, base, monkeypatch):
    def mkdir(path, *_, **__):
        raise OSError(problem, os.strerror(problem), str(path))

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "new"))
    monkeypatch.setattr("os.mkdir", mkdir)
    for place in (paths.base_dir, paths.runs_dir, paths.data_dir):
        with pytest.raises(errors.StorageError, match=f"{os.strerror(problem)}.*NANOCHAT_BASE_DIR"):
            place()


@pytest.mark.parametrize("chosen", ["here", "./here/", "a/../here", "~/here"])
def test_a_base_directory_is_absolute_at_once(chosen, base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", chosen)
    monkeypatch.setenv("HOME", str(base))
    monkeypatch.chdir(base)
    (base / "a").mkdir()
    assert paths.runs_dir().is_absolute() and paths.runs_dir().samefile(base / "here" / "runs")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    assert paths.base_dir() == base / ".cache" / "nanochat_jax"


# which stream is closed, what the program does -> (exit status, standard output, standard error)
STREAMS = [
    ("<&-", "print(input())", (1, "", "EOFError")),
    ("<&-", "print(repr(sys.stdin.read()))", (0, "''\n", "")),
    (">&-", "print('x')", (0, "", "")),
    (">&-", "print('x'); print(os.readlink('/proc/self/fd/1'), file=sys.stderr)", (0, "", "/dev/null\n")),
    ("2>&-", "print('x'); print('y', file=sys.stderr)", (0, "x\n", "")),
    ("<&- >&- 2>&-", "print('x'); open('made', 'w').write('y')", (0, "", "")),
    (">/dev/full", "print('x')", (1, "", "error: No space left on device: free some space")),
    ("", "print('naïve 🚀')", (0, "na?ve ?\n", "")),
    ("", "print('naïve', file=sys.stderr)", (0, "", "na\\xefve\n")),
    ("<file", "print(ascii(sys.stdin.read()))", (0, "'a\\ufffd\\ufffdb'\n", "")),
]  # fmt: skip


@pytest.mark.parametrize("streams, program, expected", STREAMS)
def test_closed_streams_and_an_encoding_without_letters(streams, program, expected, base):
    """Each program is run by `exit_status`, with ASCII for an encoding."""
    (base / "file").write_bytes("aöb".encode())
    text = f"import os, sys; from nanochat_jax.utils.errors import exit_status as e; exit(e(lambda: exec({program!r})))"
    command = f'exec "$0" -c "$1" {streams}'
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"]}
    done = children.run(
        ["/bin/sh", "-c", command, sys.executable, text], cwd=base, env=environment, capture_output=True, text=True
    )
    status, out, err = expected
    assert (done.returncode, done.stdout) == (status, out) and (err in done.stderr if err else not done.stderr)
    assert err == "EOFError" or "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_flag_is_one_line_and_a_slip_of_the_program_is_shown_whole(command, base, monkeypatch, capsys):
    arguments, target = FIRST[command]
    with pytest.raises(SystemExit) as stop:
        main(command, [*arguments, "--no_such_flag=1"], base)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1
    assert "--no_such_flag" in shown
    module, _, name = target.rpartition(".")
    for slip in (KeyError("a slip"), AttributeError("a slip"), ValueError("a slip")):
        monkeypatch.setattr(importlib.import_module(module), name, lambda *a, slip=slip, **k: raise_(slip))
        with pytest.raises(type(slip), match="a slip"):
            main(command, [*arguments], base)


def test_as_a_process(base):
    """The exit status and the whole of stderr, as a person meets them."""
    command = [sys.executable, "-m", "scripts.compare", "nope", "other"]
    done = children.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
