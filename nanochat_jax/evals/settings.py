"""What an evaluation can be told: the flags of scripts.eval."""

from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.evals import results
from nanochat_jax.utils.flags import flag

BUILT_IN = ("CORE", "bpb", "chat-bpb", "samples")  # every other name is a task's


@dataclass(frozen=True)
class EvalSettings:
    """Flags of scripts.eval; names and defaults are the reference's where it has them."""

    source: str | None = flag(None, "evaluate the newest run of this stage", short="i", choices=results.STAGES)
    run_name: str = flag("", "the run to evaluate; default: the newest one (of --source)", short="g")
    step: int | None = flag(None, "a checkpoint's step; default: the run's newest", short="s")
    tasks: str = flag(
        "", "names separated by |; default: what fits the run's stage (CORE|bpb|samples for base)", short="a"
    )
    max_problems: int | None = flag(None, "only the first problems of every chat task", short="x")
    max_per_task: int = flag(-1, "only so many items of every CORE task; -1: all")
    num_samples: int = flag(1, "answers to each open question; with several pass@k is reported", short="n")
    temperature: float = flag(0.0, "0 = always the most likely token", short="t")
    top_k: int = flag(50, "sample among the k most likely tokens, 0 = all", short="k")
    max_new_tokens: int | None = flag(None, "the longest answer; default 512, in the demo 128", short="m")
    seed: int = flag(42, "the same seed gives the same answers")
    eval_tokens: int = flag(20 * 524288, "tokens of held-out text for bits per byte, at most")
    data: str = flag("", "text for bits per byte; default: the downloaded shards, or the demo's text", path=True)
    text_column: str = flag("text", "name of the text column or key in parquet and jsonl files")
    task_data: Path | None = flag(None, "folder with the data sets, instead of downloading them (see tasks/hub.py)")
    eval_bundle: Path | None = flag(None, "the CORE bundle, a zip file or folder, instead of downloading it")
    batch_size: int = flag(0, "answers decoded side by side; 0: what memory and speed suggest", short="b")
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "gpu"))
    allow_unsafe_code: bool = flag(False, "run generated programs even where this host cannot isolate them")
    strict: bool = flag(
        False,
        "judge GSM8K, SpellingBee and HumanEval as the reference does: numbers as strings, code in its fences only",
    )
    again: bool = flag(False, "evaluate again what has been evaluated with the same settings")
