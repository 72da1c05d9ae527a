"""The report card: what it says is what lies on disk, for whole chains, half runs and hostile text."""

import contextlib
import io
import itertools
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from nanochat_jax.evals import results
from nanochat_jax.model import gpt
from nanochat_jax.report import card, collect, cost, markdown, plots
from nanochat_jax.report.blocks import ABSENT, Series, clean, number
from nanochat_jax.report.main import ReportSettings, main, write
from nanochat_jax.report.summary import summary
from nanochat_jax.runs import checkpoint, metrics
from nanochat_jax.utils import provenance

CONFIG = gpt.GPTConfig.from_depth(4, vocab_size=2048, sequence_len=256)
HASH = "ab" * 32
EVIL = (
    '<script>alert("x")</script> | `code` **bold** [a](http://b.c) <img src=x onerror=y>\n# head\x1b[31m \u202e \ud800'
)
TOKENS = 4096


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(base directory, what was printed) of a whole chain whose card is written, with hostile and long samples."""
    folder, printed = tmp_path_factory.mktemp("chain"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        make_chain(texts=("Tell me", EVIL, "x" * 5000))
        with contextlib.redirect_stdout(printed):
            assert main(["--price_per_hour=24"]) == 0
        yield folder, printed.getvalue()


def make_run(name, stage, steps, planned=None, parent=None, evaluations=True, texts=("The sky is",), seed=0, **loss):
    """A run folder as training leaves it: checkpoint, metrics, samples, tokenizer; and, if wanted, evaluations."""
    rng, folder = np.random.default_rng(seed), checkpoint.run_dir(name)
    settings = {"run_name": name, "depth": 4, "total_batch_size": TOKENS, "demo": True, "data": "", "sinks": ""}
    meta = {
        "stage": stage,
        "config": checkpoint.config_to_dict(CONFIG),
        "tokenizer_hash": HASH,
        "identity": {"num_iterations": planned or steps, "rows": "cd" * 32, "seed": 42},
        "settings": settings,
        "evaluated": True,
        **({"parent": parent} if parent else {}),
    }
    checkpoint.save(folder, steps, {"w": np.zeros(2, np.float32)}, meta)
    training = {"characters": 5_000_000, "documents": 1234, "seconds": 12.5, "requested_vocab_size": 2048}
    tokenizer = {"hash": HASH, "ranks": [""] * 2039, "special_tokens": {str(i): i for i in range(9)}}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "training": training}))
    log = metrics.MetricsLog(folder / "metrics.jsonl")
    versions = {"jax": "0.10.2", "numpy": "2.3.5"}
    machine = {"cpu": "A CPU", "cpu_cores": 2, "memory_bytes": 24 * 2**30, "python": "3.11.7", "versions": versions}
    devices = {"devices": 1, "device_kind": "cpu", "backend": "cpu", "processes": 1}
    log.write({"kind": "session", "step": 0, "time": "2026-11-24T10:00:00+00:00", **devices, **machine})
    start, end = loss.get("start", 7.6), loss.get("end", 2.1)
    for step in range(steps + 1):
        if step % max(steps // 4, 1) == 0:
            bpb = 0.9 + 1.6 * math.exp(-3 * step / steps)
            rate = 0.3 + 0.4 * step / steps
            passes = {f"pass@{k}": rate + 0.05 * (k - 1) for k in range(1, 5)}
            passes.update({"pass@1_low": rate - 0.04, "pass@1_high": rate + 0.05})
            numbers = passes if stage == "rl" else {"val_bpb": bpb}
            log.write({"kind": "eval", "step": step, **numbers, "seconds": 1.25})
            log.write({"kind": "sample", "step": step, "texts": [f"{t} at step {step}" for t in texts]})
        if step == steps:
            break
        value = end + (start - end) * math.exp(-5 * step / steps) + 0.05 * rng.standard_normal()
        extra = {"reward": 0.3 + 0.4 * step / steps + 0.05 * rng.standard_normal()} if stage == "rl" else {}
        seconds = 0.5 + 0.01 * rng.random()
        extra |= {"grad_norm": 0.4 + 0.1 * rng.random(), "lr_multiplier": min(1.0, 2.5 * (1 - step / steps))}
        clock = {"seconds": seconds, "tok_per_sec": TOKENS / seconds, "data_wait": 0.001, "mfu": 0.42}
        log.write({"kind": "train", "step": step, "loss": value, **extra, **clock})
    if stage == "rl":
        sample = {"question": 7, "prompt": "What is 2 + 3?", "completion": texts[-1], "reward": 1.0}
        log.write({"kind": "transcripts", "step": steps, "samples": [sample]})
    log.close()
    if evaluations:
        add_evaluations(folder, stage, steps, rng)
    return folder


def add_evaluations(folder, stage, step, rng):
    def items(rate, n):
        return [{"id": i, "correct": int(c)} for i, c in enumerate(rng.random(n) < rate)]

    if stage == "base":
        tasks = {
            name: {"accuracy": rate, "centered": rate - 0.1, "interval": [rate - 0.03, rate + 0.03], "n": 100}
            for name, rate in (("hellaswag", 0.31), ("lambada_openai", 0.1234567), ("squad", 0.02))
        }
        core = {"kind": "core", "centered": 0.2219, "interval": [0.2101, 0.2333], "tasks": tasks}
        results.save(folder, step, {"task": "CORE", "settings": {}, "seconds": 61.5, "n": 300, **core})
        return
    chat = dict(zip(results.CHAT_BASELINES, (0.45, 0.33, 0.32, 0.05, 0.09, 0.98), strict=True))
    for task, rate in {**chat, "world/sums": 0.97, "world/choice": 0.6}.items():
        chance = results.CHAT_BASELINES.get(task, 0.25 if task == "world/choice" else 0.0)
        kind = "categorical" if chance else "generative"
        more = {"pass_at_k": {"1": rate, "4": 0.8125}, "unfinished": 0.03} if kind == "generative" else {}
        rate = min(rate * {"mid": 0.9, "sft": 1.0, "rl": 1.02}[stage], 1.0)
        results.save(folder, step, results.scored(task, kind, items(rate, 200), chance, {}, 3.5, **more))


def child_of(run, step):
    return {"run": run, "step": step, "stage": run.rpartition("-")[2]}


def make_chain(texts):
    make_run("demo", "base", 200, texts=texts)
    make_run("demo-mid", "mid", 80, parent=child_of("demo", 200), texts=texts, start=2.4, end=1.4)
    make_run("demo-sft", "sft", 60, parent=child_of("demo-mid", 80), texts=texts, start=1.4, end=0.8)
    make_run("demo-rl", "rl", 40, parent=child_of("demo-sft", 60), texts=texts, start=0.1, end=0.0)


def pages(base) -> tuple[str, ...]:
    """The card that was written, as HTML and as Markdown."""
    return tuple((base / "report" / name).read_text() for name in ("report.html", "report.md"))


def rendered(*runs) -> str:
    return markdown.render(card.build(collect.load(list(runs))))


class Page(HTMLParser):
    """Every tag with its attributes, the visible text, and the cells of every table by its first column."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.rows, self._row, self._open = [], [], [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "use", "br"):
            self._open.append(tag)
        if tag == "tr":
            self._row = []
        elif tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag):
        if tag in self._open:
            assert self._open.pop() == tag, f"<{tag}> is closed out of order"
        if tag == "tr" and self._row is not None:
            self.rows.append(self._row)
            self._row = None

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            return
        self.text.append(data)
        if self._row:
            self._row[-1] += data


def summary_rows(page):
    """The summary table of a page: metric -> cells."""
    start = next(i for i, row in enumerate(page.rows) if row[:2] == ["Metric", "BASE"])
    assert page.rows[start] == ["Metric", "BASE", "MID", "SFT", "RL"]
    others = ("Task", "Encoding", "Number", "What")
    return {row[0]: row[1:] for row in itertools.takewhile(lambda row: row[0] not in others, page.rows[start + 1 :])}


def kept(run, step, task):
    return json.loads(results.path_of(checkpoint.run_dir(run), step, task).read_text())


def test_a_full_chain_is_found_and_its_card_says_what_is_on_disk(chain):
    base, printed = chain
    raw, text = pages(base)
    page = Page(raw)
    rows = summary_rows(page)
    columns = {"demo-mid": (1, 80), "demo-sft": (2, 60), "demo-rl": (3, 40)}
    for task in (*results.CHAT_BASELINES, "world/sums", "world/choice"):
        assert rows[task][0] == ABSENT
        for run, (column, step) in columns.items():
            saved = kept(run, step, task)
            low, high = saved["interval"]
            assert rows[task][column] == f"{number(saved['accuracy'])}[{number(low)}, {number(high)}]"
            assert float(rows[task][column].split("[")[0]) == pytest.approx(saved["accuracy"], rel=5e-4)
            assert f"{number(saved['accuracy'])} [{number(low)}, {number(high)}]" in printed
    assert rows["CORE"] == ["0.2219[0.2101, 0.2333]", ABSENT, ABSENT, ABSENT]
    expected, limits = results.chatcore(results.load(checkpoint.run_dir("demo-sft")))
    assert rows["ChatCORE"][2] == f"{number(expected)}[{number(limits[0])}, {number(limits[1])}]"
    last = [r for r in metrics.read(checkpoint.run_dir("demo") / "metrics.jsonl") if r["kind"] == "eval"][-1]
    assert rows["bits per byte"] == [number(last["val_bpb"])] * 3 + [ABSENT]
    # the first evaluation of reinforcement learning, before any update, is of the finetuned model
    pass_row = rows["pass@1 (RL, held out)"]
    assert pass_row == [ABSENT, ABSENT, "0.3000[0.2600, 0.3500]", "0.7000[0.6600, 0.7500]"]
    for task, core in kept("demo", 200, "CORE")["tasks"].items():
        low, high = core["interval"]
        assert [task, f"{number(core['accuracy'])}[{number(low)}, {number(high)}]"] in [row[:2] for row in page.rows]
    # the Markdown file holds the same table, cell for cell
    for metric, cells in rows.items():
        line = next(x for x in text.splitlines() if x.replace("\\", "").startswith(f"| {metric} "))
        found = [c.strip().replace("\\", "").replace("<br>", "") for c in line.strip("|").split(" | ")]
        assert found == [metric, *cells]
    visible = " ".join(page.text)
    for fact in (HASH, "cd" * 32, "A CPU, 2 cores", "24 GiB", "0.10.2", provenance.source().sha256):
        assert fact in visible and fact in text
    assert "pass@4 0.8125, 3.000 % of completions cut off" in visible


def test_time_and_money_are_sums_of_what_was_logged(chain):
    names, left_out = collect.find_chain()
    assert (names, left_out) == (["demo", "demo-mid", "demo-sft", "demo-rl"], [])
    runs = collect.load(names)
    expected = 12.5  # the tokenizer's, once
    for run, step in (("demo", 200), ("demo-mid", 80), ("demo-sft", 60), ("demo-rl", 40)):
        folder = checkpoint.run_dir(run)
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            expected += json.loads(line).get("seconds", 0.0)
        for path in (folder / "evals" / f"step-{step:08d}").glob("*.json"):
            expected += json.loads(path.read_text())["seconds"]
    money = cost.cost(runs, 36.0)
    assert money.seconds == pytest.approx(expected)
    assert money.dollars == pytest.approx(expected / 100)
    assert "as given" in money.rate
    assert cost.cost(runs, None).dollars is None  # nobody knows what this computer costs
    for run in runs:
        run.sessions[-1].update(device_kind="NVIDIA H100 80GB HBM3", backend="gpu", devices=8)
    assumed = cost.cost(runs, None)
    assert assumed.dollars == pytest.approx((expected - 12.5) / 3600 * 8 * 3.00)
    assert "8 x NVIDIA H100 80GB HBM3 at $3.00" in assumed.rate and "assumed" in assumed.rate


def test_only_base_in_the_middle_of_training_with_a_torn_line(base, capsys):
    folder = make_run("half", "base", 30, planned=120, evaluations=False)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 30, "lo')
    assert main([]) == 0
    printed = capsys.readouterr().out
    page = Page(pages(base)[0])
    for place in (printed, " ".join(page.text)):
        assert "newest checkpoint is step 30 of 120" in place
    assert list(summary_rows(page)) == ["bits per byte"]
    assert len(collect.load_run("half").train) == 30 and "122,880" in pages(base)[1], "30 steps of 4,096 tokens"


def test_a_run_without_any_metrics_or_session_still_has_a_card(base, capsys):
    folder = make_run("bare", "sft", 5, parent=child_of("gone-mid", 9), evaluations=False)
    (folder / "metrics.jsonl").unlink()
    (folder / "tokenizer.json").unlink()
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "no metrics.jsonl" in printed and "began from gone-mid" in printed
    text = pages(base)[1]
    assert "Nothing has been evaluated yet" in text and "did not record where they ran" in text


def test_a_single_step_and_values_that_are_no_numbers(base):
    folder = make_run("one", "base", 1, evaluations=False)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"kind": "eval", "step": 1, "val_bpb": Infinity, "note": "text"}\n')
    write(ReportSettings())
    assert summary_rows(Page(pages(base)[0]))["bits per byte"][0] == "inf"


def test_skipped_steps_and_incidents_are_shown(base):
    folder = make_run("one", "base", 40, evaluations=False)
    with open(folder / "metrics.jsonl", "a") as f:
        for step in range(10, 17):
            why = f"loss nan, gradient norm {step}" if step < 16 else EVIL
            f.write(json.dumps({"kind": "skip", "step": step, "loss": "nan", "grad_norm": "nan", "reason": why}) + "\n")
        f.write('{"kind": "incident", "step": 1200, "what": "out of memory", "rows": 32}\n')
        f.write('{"kind": "incident", "step": 12, "what": "hang", "seconds": 601.5}\n')
    write(ReportSettings())
    raw, text = pages(base)
    for shown in ["".join(Page(raw).text), text]:
        assert "10 (loss nan, gradient norm 10), " in shown and "14 (loss nan, gradient norm 14) and 2 more" in shown
        assert "at step 1,200 with 32 rows a device" in shown and "12 (nothing for 10m02s)" in shown
    assert raw.count("stroke-dasharray") >= 7, "a mark on the loss curve for each"
    make_run("two", "base", 40, evaluations=False)
    write(ReportSettings(runs="two"))
    assert "skipped steps" not in pages(base)[0], "no trouble, no line"


def record_code(name, **code):
    folder = checkpoint.run_dir(name)
    path = checkpoint.step_dir(folder, checkpoint.steps(folder)[-1]) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": code}))


def test_a_traced_run_says_how_to_look_at_its_trace(base):
    folder = make_run("one", "base", 4, evaluations=False)
    write(ReportSettings())
    assert "xprof" not in pages(base)[1]
    (folder / "profile").mkdir()
    write(ReportSettings())
    assert "xprof --logdir=one/profile" in pages(base)[1]


def test_every_stage_has_its_code_and_different_code_is_named(base, capsys):
    make_run("b", "base", 4, evaluations=False)
    make_run("m", "mid", 4, parent=child_of("b", 4), evaluations=False)
    now = provenance.source()

    def shown():
        assert main([]) == 0
        facts = dict(re.findall(r"^\* ([bm]: code): (.*)$", pages(base)[1], re.M))
        return facts, capsys.readouterr().out

    facts, printed = shown()
    assert facts == {"b: code": "not recorded", "m: code": "not recorded"} and "different code" not in printed
    record_code("b", sha256=now.sha256, commit="c" * 40, dirty=False)
    record_code("m", sha256=now.sha256, commit="d" * 40, dirty=True)
    facts, printed = shown()
    assert facts["b: code"] == f"{now.sha256} (as now), commit {'c' * 40}"
    assert facts["m: code"] == f"{now.sha256} (as now), commit {'d' * 40} with uncommitted changes"
    assert "different code" not in printed, "another commit of the same source"
    record_code("m", sha256="e" * 64, commit="", dirty=False)
    facts, printed = shown()
    assert facts["m: code"] == f"{'e' * 64} (not that of now)"
    remark = f"These runs were trained by different code (b: {now.sha256[:12]}, m: {'e' * 12})."
    assert f"note: {remark}" in printed and "different code" in pages(base)[0]


def test_no_run_and_unknown_runs_are_errors_that_say_what_to_do(base, capsys):
    assert main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: nothing to report") and "speedrun_jax.sh" in error
    make_run("demo", "base", 2, evaluations=False)
    assert main(["--runs=demo,other"]) == 1
    assert "named 'other'" in (error := capsys.readouterr().err) and "demo" in error
    (base / "runs" / "started").mkdir()
    assert main(["--runs=started"]) == 1
    assert "before its first checkpoint" in capsys.readouterr().err
    assert main(["--runs=../x"]) == 1
    assert main(["--price_per_hour=-1"]) == 1
    assert not (base / "report").exists()


def test_evaluations_of_an_older_step_are_shown_and_named(base, capsys):
    folder = make_run("demo", "base", 20, evaluations=False)
    add_evaluations(folder, "base", 10, np.random.default_rng(0))
    result = {"kind": "core", "settings": {}, "n": 1, "tasks": {}, "items": []}
    results.save(folder, 5, {"task": "CORE", "centered": 0.9, **result})
    results.save(folder, 20, {"task": "CORE", "skipped": "no bundle", **result})
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "demo has evaluations of step 10, but its newest checkpoint is step 20" in printed
    assert summary_rows(Page(pages(base)[0]))["CORE"][0].startswith("0.2219")


def test_the_newest_run_of_the_last_stage_decides_and_newer_others_are_named(base, capsys):
    make_run("old", "base", 2, evaluations=False)
    make_run("old-mid", "mid", 2, parent=child_of("old", 2), evaluations=False)
    fresh = make_run("fresh", "base", 2, evaluations=False)
    meta = checkpoint.step_dir(fresh, 2) / "meta.json"
    os.utime(meta, (meta.stat().st_atime, meta.stat().st_mtime + 10))
    assert collect.find_chain() == (["old", "old-mid"], ["fresh"])
    assert main([]) == 0
    assert "fresh. Name those you want with --runs" in capsys.readouterr().out
    assert main(["--runs=fresh,old"]) == 0  # the same stage twice: columns by run name
    assert "BASE fresh" in capsys.readouterr().out


def test_text_by_a_model_stays_text(chain):
    base, _ = chain
    raw, text = pages(base)
    page = Page(raw)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "base", "form"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert '<script>alert("x")</script>' in "".join(page.text)
    assert not any(c in raw for c in "\x1b\u202e\ud800")
    assert "question 7, reward 1.000" in "".join(page.text)
    assert "more characters)" in raw and "x" * 2000 not in raw
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)  # without code blocks
    assert "<script" not in outside and "<img" not in outside and "](http" not in outside and "**bold**" not in outside
    table_lines = [line for line in outside.splitlines() if "alert" in line]
    assert table_lines and all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table_lines)


def test_a_code_block_cannot_be_left_from_inside():
    text = "before\n````\n<b>after</b>\n```"
    first, *inside, last = markdown._fence(text).splitlines()
    assert first == last == "`````" and "\n".join(inside) == text


def test_the_page_needs_nothing_from_outside(chain):
    base, _ = chain
    raw = pages(base)[0]
    page = Page(raw)
    for tag, attributes in page.tags:
        assert tag not in ("link", "script", "img"), tag
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "url(http" not in raw and "@import" not in raw and "currentColor" in raw and "prefers-color-scheme" in raw
    ids = [a["id"] for _, a in page.tags if "id" in a]
    links = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert links <= set(ids) and len(links) >= 9
    assert set(re.findall(r"url\(#([^)]+)\)", raw)) <= set(ids)


def test_before_and_after_belong_to_the_same_prompts(base):
    make_run("demo", "base", 8, texts=("The sky is",), evaluations=False)
    make_run("demo-mid", "mid", 8, parent=child_of("demo", 8), texts=("Who are you?",), evaluations=False)

    def keep_last_sample(run):
        path = checkpoint.run_dir(run) / "metrics.jsonl"
        kept = [x for x in path.read_text().splitlines() if '"sample"' not in x or '"step": 8' in x]
        path.write_text("\n".join(kept) + "\n")

    keep_last_sample("demo-mid")
    text = rendered("demo", "demo-mid")
    assert "before (demo, step 0) | after (demo, step 8)" in text
    assert "| after (demo-mid, step 8) |" in text  # the parent answered other prompts: no pair
    make_run("demo-sft", "sft", 8, parent=child_of("demo-mid", 8), texts=("Who are you?",), evaluations=False)
    keep_last_sample("demo-sft")
    text = rendered("demo-mid", "demo-sft")
    assert "before (demo-mid, step 8) | after (demo-sft, step 8)" in text


def test_commands_spell_out_what_was_set(chain):
    text = rendered("demo", "demo-mid")
    assert "python -m scripts.tok_train --demo --vocab_size=2048" in text
    assert "--stage=mid --run_name=demo-mid --source=demo --depth=4" in text
    assert "--data=" not in text.split("Do it again")[1]
    assert "python -m scripts.report --runs=demo,demo-mid" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.2219, "0.2219"), (0.06, "0.0600"), (0.061234, "0.06123"), (1.0, "1.000"), (0.0, "0.000"), (4145.2, "4,145"),
        (123456.7, "123,500"), (12.3456, "12.35"), (1e-5, "1.000e-05"), (-0.02195, "-0.02195"), (1638400, "1,638,400"),
        (None, ABSENT), (float("nan"), "nan"), (999.96, "1000"), (0.00012, "0.00012"),
    ],
)  # fmt: skip
def test_numbers_have_four_significant_digits(value, shown):
    assert number(value) == shown


def test_clean_keeps_text_and_drops_what_rearranges_it():
    assert clean("a\tb\nc é 日本 👩\u200d🦽") == "a\tb\nc é 日本 👩\u200d🦽"
    assert clean("a\x00b\u202ec\ud800\u2028") == "a\ufffdb\ufffdc\ufffd\ufffd"
    assert clean("abcdef", 2) == "ab … (4 more characters)"


def test_smoothing_keeps_a_straight_line_and_thinning_the_mean():
    line = np.linspace(3.0, 1.0, 1000)
    inside = slice(60, -60)
    np.testing.assert_allclose(plots.smoothed(line)[inside], line[inside], atol=1e-9)
    x, y = plots.thinned(range(1000), line, 100)
    assert len(x) == 100 and np.mean(y) == pytest.approx(2.0)
    assert plots.sparkline(Series("s", [0, 1, 2], [0.0, 0.5, 1.0])) == "▁▅█ 0.000 → 1.000"
    assert plots.sparkline(Series("s", [], [])) == ""


def test_the_summary_keeps_its_order(chain):
    names = [row.metric for row in summary(collect.load(["demo", "demo-sft", "demo-rl"]))]
    assert names[:3] == ["CORE", "bits per byte", "ARC-Easy"]
    last = ["SpellingBee", "ChatCORE", "world/choice", "world/sums", "pass@1 (RL, held out)", "pass@4 (RL, held out)"]
    assert names[-6:] == last


def test_the_source_hash_follows_the_source(tmp_path, monkeypatch):
    package = tmp_path / "nanochat_jax"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(provenance.nanochat_jax, "__file__", str(package / "__init__.py"))
    first = provenance.source()
    assert (first.files, first.lines, first.commit) == (1, 1, "")
    assert provenance.source() == first
    (package / "__init__.py").write_text("a = 2\n")
    assert provenance.source().sha256 != first.sha256


def test_compression_is_shown_only_for_the_same_tokenizer(base):
    make_run("demo", "base", 2, evaluations=False)
    measures = {"ours": {"news": {"bytes": 400, "tokens": 160}}, "gpt2": {"news": {"bytes": 400, "tokens": 100}}}
    path = base / "tokenizer" / "evaluation.json"
    path.parent.mkdir()
    for its_hash, shown in ((HASH, True), ("00" * 32, False)):
        path.write_text(json.dumps({"tokenizer_hash": its_hash, "measures": measures}))
        text = rendered("demo")
        assert bool(re.search(r"\| ours +\| 2\.500 \|\n\| gpt2 +\| 4\.000 \|", text)) == shown
