"""The model card (README.md) of an exported folder, filled from what the run and its parents recorded."""

from typing import Any

from nanochat_jax.evals import results
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.layers import NORM_EPS
from nanochat_jax.model.parameters import num_params
from nanochat_jax.report import collect, stage, summary
from nanochat_jax.report.collect import ReportError, Run
from nanochat_jax.runs import checkpoint
from nanochat_jax.text.tokenizer import Tokenizer

_USE = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
{use}
print(tokenizer.decode(model.generate(ids)[0, ids.shape[1]:]))
```

Needs a `transformers` that knows `model_type: nanochat` (5 or newer). Text is encoded with `<|bos|>` in front, as the
model was trained; the chat template brings its own.""",
    "reference": """Set `NANOCHAT_BASE_DIR` to this folder: its `*_checkpoints/` and `tokenizer/` are laid out as
nanochat of October 2025 expects them. Weights are float32, the embedding included.""",
    "safetensors": """`model.safetensors` holds float32 matrices under the reference's names, as (out, in);
`nanochat_jax.json` has the configuration. `python -m scripts.import_checkpoint` of nanochat_jax reads the folder.""",
}
_CHAT = """ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=False)"""
_TEXT = 'ids = tokenizer("The capital of France is", return_tensors="pt").input_ids'


def model_card(
    target: str, config: GPTConfig, tokenizer: Tokenizer, meta: dict[str, Any], found: dict[str, Any]
) -> str:
    """The card's text. found: what the check with the target's library gave."""
    runs = chain(meta)
    tags = ["nanochat", "jax", *(["transformers"] if target == "hf" else [])]
    head = [
        "---",
        *(["library_name: transformers"] if target == "hf" else []),
        "pipeline_tag: text-generation",
        "tags:",
    ]
    lines = [*head, *(f"- {tag}" for tag in tags), "---", "", f"# {meta['run']}", ""]
    lines += [
        f"A language model of {num_params(config):,} parameters, trained with nanochat_jax: "
        f"stage {meta['stage']}, step {meta['step']:,}.",
        "",
        "## Use",
        "",
        _USE[target].format(use=_TEXT if meta["stage"] == "base" else _CHAT),
        "",
        *_limits(target, meta),
        "",
        "## Model",
        "",
        *_facts(
            {
                "layers, width": f"{config.n_layer}, {config.n_embd}",
                "heads (queries, keys)": f"{config.n_head}, {config.n_kv_head}",
                "context": f"{config.sequence_len:,} tokens",
                "vocabulary": f"{tokenizer.vocab_size:,} tokens",
                "RMS norm epsilon": f"{NORM_EPS:.9g}",
                "rotary tables while training": config.rotary_dtype,
                "logit softcap": f"{config.softcap:g}",
            }
        ),
        "",
        "## Training",
        "",
        *_training(runs, meta),
        "",
        "## Evaluation",
        "",
        *_evaluation(runs),
        "",
        "## Checked",
        "",
        *_checked(target, config, found),
        "",
        "## Provenance",
        "",
        *_provenance(meta),
        "",
    ]
    return "\n".join(lines)


def chain(meta: dict[str, Any]) -> list[Run]:
    """The run and those it began from, as far as they are on this disk, the first stage first."""
    runs: list[Run] = []
    name: str | None = meta["run"]
    while name and name not in [run.name for run in runs]:
        try:
            runs.insert(0, collect.load_run(name))
        except (ReportError, results.ResultError):
            break
        name = (runs[0].meta.get("parent") or {}).get("run")
    return runs


def _limits(target: str, meta: dict[str, Any]) -> list[str]:
    lines = ["## Limits", ""]
    if meta["stage"] == "base":
        lines.append("- A base model: it continues text and holds no conversation.")
    else:
        lines += [
            "- It was trained to call a calculator (`<|python_start|>` expression `<|python_end|>`) and to continue "
            "after its answer (`<|output_start|>` ... `<|output_end|>`). Plain generation does not run it: the model "
            "then invents an answer.",
            "- The chat template refuses messages that contain the names of special tokens.",
        ]
    lines.append("- Small models state falsehoods with ease. No safety training was done.")
    return lines


def _training(runs: list[Run], meta: dict[str, Any]) -> list[str]:
    if imported := meta.get("imported"):
        return [f"Imported from {imported['kind']} files ({imported['name']}); how it was trained is not known here."]
    rows = [["stage", "run", "steps", "tokens", "training time", "data"]]
    for run in runs:
        data = "demo world" if run.meta.get("settings", {}).get("demo") else "see the run's settings"
        rows.append(
            [
                run.stage,
                run.name,
                f"{run.step:,}",
                f"{stage.tokens_seen(run) or 0:,.0f}",
                f"{run.train_seconds:,.0f} s",
                data,
            ]
        )
    return [results.aligned(rows)] if runs else ["The run's records are not on this disk."]


def _evaluation(runs: list[Run]) -> list[str]:
    rows = [["metric", *(summary.stage_label(run, runs) for run in runs)]]
    for row in summary.summary(runs) if runs else []:
        rows.append([row.metric, *(_value(v) for v in row.values)])
    if len(rows) == 1:
        return ["Nothing has been evaluated."]
    return [
        results.aligned(rows),
        "",
        "In brackets: 95 % intervals. Bits per byte are on each stage's own held-out text.",
    ]


def _value(value: summary.Value | None) -> str:
    if value is None:
        return "-"
    limits = "" if value.low is None or value.high is None else f" [{value.low:.4f}, {value.high:.4f}]"
    return f"{value.value:.4f}{limits}"


def _checked(target: str, config: GPTConfig, found: dict[str, Any]) -> list[str]:
    if "missing" in found:
        return ["This folder was not loaded with the target's library when it was written."]
    facts = {
        "library": found["library"],
        "largest logit difference, float32": f"{found['max_diff']:.2g}",
        "the same with equal rotary tables": f"{found['max_diff_equal_tables']:.2g}",
        "greedy continuations that agree": f"{found['greedy_agree']} of {found['greedy']}, "
        f"{found['greedy_tokens']} tokens each",
    }
    lines = _facts(facts)
    if target == "hf" and config.rotary_dtype == "bfloat16":
        lines += [
            "",
            "The model was trained with rotary tables rounded to bfloat16; `transformers` uses float32 tables.",
        ]
    return lines


def _provenance(meta: dict[str, Any]) -> list[str]:
    identity, parent, code = meta.get("identity", {}), meta.get("parent") or {}, meta.get("code") or {}
    facts = {
        "tokenizer": meta["tokenizer_hash"],
        "training rows": identity.get("rows") or identity.get("task") or "-",
        "parent": f"{parent['run']}, step {parent['step']:,}" if parent else "-",
        "code": code.get("commit") or code.get("sha256") or "not recorded",
        "checkpoint": checkpoint.step_dir(checkpoint.run_dir(meta["run"]), meta["step"]).name,
    }
    return [*_facts(facts), "", "`SHA256SUMS` has the hash of every file: `sha256sum -c SHA256SUMS`."]


def _facts(facts: dict[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in facts.items()]
