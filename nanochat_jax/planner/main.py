"""`python -m scripts.plan`: what a run needs, takes and costs on given GPUs, before any is rented."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from nanochat_jax.data.shards import CHARS_PER_TOKEN, SHARD_CHARS
from nanochat_jax.hardware import gpus as cards
from nanochat_jax.hardware import xla_flags
from nanochat_jax.model.config import RECIPES
from nanochat_jax.model.parameters import num_scaling_params
from nanochat_jax.planner import compile as compiled
from nanochat_jax.planner import cost, fit_batch, memory
from nanochat_jax.planner.plan import DEFAULTS, DEPTH, SEQUENCE_LEN, BasePlan, PlanError, optimizer_numbers
from nanochat_jax.training.optim import OptimHyper
from nanochat_jax.utils import errors, flags
from nanochat_jax.utils.flags import flag

SHARD_BYTES = 100e6  # a downloaded shard of the default data set, compressed
SPARE_SHARDS = 1.1  # more than the tokens need: documents and tokenizers differ
SLOTS, SLOT_TOKENS = 64, 1024  # of reinforcement learning, which samples most at once


def _of_recipes(name: str) -> str:
    return ", ".join(
        f"{recipe} {values[name]:g}" if isinstance(values[name], float) else f"{recipe} {values[name]}"
        for recipe, values in DEFAULTS.items()
    )


@dataclass(frozen=True)
class PlanSettings:
    """Flags of scripts.plan."""

    depth: int = flag(0, f"the one dial: layers (default {DEPTH}; with --hours or --dollars it is what is proposed)")
    gpu: str = flag("h100", f"the card: {', '.join(cards.CARDS)}")
    gpus: int = flag(8, "cards of one node")
    hours: float = flag(0.0, "propose the depth whose whole run takes at most so many hours")
    dollars: float = flag(0.0, "propose the depth whose whole run costs at most so many dollars")
    price: float = flag(0.0, "dollars per GPU and hour; 0: a typical price of the card")
    mfu: float = flag(0.45, "share of the card's peak FLOP/s assumed for time and dollars")
    recipe: str = flag("v1", "nanochat of October 2025 (v1) or of July 2026 (modern)", choices=RECIPES)
    vocab_size: int = flag(0, f"vocabulary; 0: the recipe's ({_of_recipes('vocab_size')})")
    max_seq_len: int = flag(SEQUENCE_LEN, "context length in tokens")
    total_batch_size: int = flag(
        0,
        f"tokens per optimizer step; 0: the recipe's ({_of_recipes('total_batch_size')}; -1 is derived from the model)",
    )
    target_param_data_ratio: float = flag(
        0.0,
        "training tokens per parameter (in modern, of the matrices and lm_head); 0: the recipe's "
        f"({_of_recipes('target_param_data_ratio')})",
    )
    device_batch_size: int = flag(0, "rows per device and micro-step; 0: every power of two that divides")
    remat: str = flag("none", "activations recomputed in the backward pass", choices=("none", "mlp", "block"))
    fp8: bool = flag(False, "products of the layers in float8 (time and dollars stay those of --mfu)")
    fsdp: int = flag(1, "devices over which the parameters are sharded too")
    tensor: int = flag(1, "devices over which heads, MLP and vocabulary are sharded")
    compile: bool = flag(True, "compile the real programs for the card (needs the extra plan, no GPU)")
    json: bool = flag(False, "print JSON instead of text")


def main(argv: list[str]) -> int:
    """Exit status: 0 planned, 1 impossible, 2 bad flags."""
    settings = flags.parse(PlanSettings, argv, __doc__ or "", echo=False)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin may be here without any GPU
    jax.config.update("jax_platforms", "cpu")  # nor is a GPU wanted: what is compiled is compiled in a child process

    def action() -> None:
        facts = make(settings, _silent if settings.json else lambda line: print(line, file=sys.stderr, flush=True))
        print(json.dumps(facts, indent=1) if settings.json else describe(facts))

    return errors.exit_status(action)


def _silent(line: str) -> None:
    pass


def make(settings: PlanSettings, say=_silent) -> dict[str, Any]:
    """Everything the command prints, as JSON-able facts. Raises ValueError (PlanError) for what cannot be."""
    card = cards.find(settings.gpu)
    key = next(k for k, c in cards.CARDS.items() if c is card)
    _check(settings)
    price, mesh = settings.price or card.price, memory.Mesh(settings.gpus, settings.fsdp, settings.tensor)

    given = {name: getattr(settings, name) or value for name, value in DEFAULTS[settings.recipe].items()}

    def plan_of(depth: int, rows: int = 1) -> BasePlan:
        return BasePlan.derive(
            depth=depth,
            max_seq_len=settings.max_seq_len,
            device_batch_size=rows,
            devices=mesh.rows,
            hyper=OptimHyper.of(settings.recipe),
            **given,
        )

    def cost_of(p: BasePlan) -> cost.Cost:
        return cost.cost(p, card, settings.gpus, settings.mfu, price)

    def estimated(p: BasePlan, rows: int) -> int:
        return memory.estimate(p.config, rows, mesh, settings.remat)

    limit = int(card.memory_bytes * xla_flags.MEMORY_FRACTION * (1 - fit_batch.MARGIN))
    depth, why = settings.depth or DEPTH, "--depth"
    if settings.hours or settings.dollars:
        hours, dollars = settings.hours or None, settings.dollars or None
        depth = cost.propose_depth(plan_of, cost_of, lambda p: estimated(p, 1) <= limit, hours, dollars)
        why = "the largest even depth within the budget"
    base = plan_of(depth)
    rows_per_device = base.total_batch_size // base.max_seq_len // mesh.rows
    wanted = [settings.device_batch_size] if settings.device_batch_size else fit_batch.sizes(rows_per_device)
    for rows in wanted:
        plan_of(depth, rows)  # an impossible size is refused with a remedy
    steps, note = _compiled_steps(settings, key, base, wanted, rows_per_device, say)
    sizes = []
    for rows, facts in zip(wanted, steps, strict=True):
        need = facts["bytes"] if facts else estimated(base, rows)
        line = cost.roofline_of_compiled(facts, card) if facts else None
        sizes.append(
            {
                "rows": rows,
                "accumulation": rows_per_device // rows,
                "bytes": need,
                "compiled": facts is not None,
                "fits": need <= limit,
                "seconds_bound": line.bound if line else None,
            }
        )
    fitting = [i for i, size in enumerate(sizes) if size["fits"]]
    chosen = fitting[-1] if fitting else 0
    step = steps[chosen]
    per_step = base.flops_per_token * base.total_batch_size
    if step:
        line = cost.roofline_of_compiled(step, card)
    else:
        line = cost.roofline_of_formula(base.config, base.total_batch_size, settings.gpus, card)
    seconds = cost.seconds_at(settings.mfu, per_step, settings.gpus, card)
    total = cost_of(base)
    return {
        "depth": depth,
        "depth_from": why,
        "recipe": settings.recipe,
        "config": asdict(base.config),
        "parameters": base.n_params,
        "scaling": _scaling_facts(base),
        "tokens": base.total_tokens,
        "total_batch_size": base.total_batch_size,
        "steps": base.num_iterations,
        "flops": base.total_flops,
        "flops_per_token": base.flops_per_token,
        "data": _data(base),
        "gpu": {"name": card.name, "count": settings.gpus, "memory_bytes": card.memory_bytes, "usable_bytes": limit},
        "remat": settings.remat,
        "mesh": {"data": mesh.rows // mesh.fsdp, "fsdp": mesh.fsdp, "tensor": mesh.tensor},
        "memory_note": note,
        "sizes": sizes,
        "device_batch_size": wanted[chosen] if fitting else None,
        "step": _step_facts(step),
        "other_programs": _others(settings, key, base, wanted[chosen], step, limit, say) if step else [],
        "time": {
            "roofline": asdict(line) | {"bound": line.bound, "limited_by": line.limited_by},
            "mfu_at_bound": per_step / settings.gpus / card.bf16_flops / line.bound,
            "mfu": settings.mfu,
            "seconds_per_step": seconds,
            "tokens_per_second": base.total_batch_size / seconds,
            "base_hours_bound": base.num_iterations * line.bound / 3600,
            "base_hours": total.base_hours,
            "hours": total.hours,
        },
        "price_per_gpu_hour": price,
        "dollars": total.dollars,
    }


def _scaling_facts(base: BasePlan) -> dict[str, Any] | None:
    """What the modern recipe derives; None for v1."""
    if base.scaling is None:
        return None
    names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
    return {
        "parameters": num_scaling_params(base.config),
        "tokens": base.scaling.tokens,
        "rates_factor": base.scaling.rates,
        "weight_decay_factor": base.scaling.weight_decay,
        **{name: getattr(base.hyper, name) for name in names},
    }


def _check(settings: PlanSettings) -> None:
    if settings.depth and (settings.hours or settings.dollars):
        raise PlanError("--depth cannot be combined with --hours or --dollars")
    for name in ("depth", "hours", "dollars", "price", "device_batch_size"):
        if getattr(settings, name) < 0:
            raise PlanError(f"--{name} must not be negative, got {getattr(settings, name)}")
    for name in ("gpus", "fsdp", "tensor"):
        if getattr(settings, name) < 1:
            raise PlanError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if settings.gpus % (settings.fsdp * settings.tensor):
        raise PlanError(f"--fsdp={settings.fsdp} x --tensor={settings.tensor} must divide --gpus={settings.gpus}")
    if not 0 < settings.mfu <= 1:
        raise PlanError(f"--mfu is a share of the peak, above 0 and at most 1, got {settings.mfu:g}")


def _compiled_steps(settings, key: str, base: BasePlan, wanted: Sequence[int], rows_per_device: int, say):
    """(the numbers of a compiled step for every size, or Nones; what to say about the memory)."""
    estimate = f"an estimate by formula, within about {memory.ERROR:.0%} of what compiling gives"
    if not settings.compile:
        return [None] * len(wanted), f"{estimate} (--compile=False)"
    cases = [_case(settings, key, base, "step", rows, rows_per_device // rows) for rows in wanted]
    try:
        return compiled.results(cases, say), "compiled for this card"
    except (compiled.NoPlugin, compiled.CompileError) as error:
        return [None] * len(wanted), f"{estimate}: {error}"


def _case(settings, key: str, base: BasePlan, program: str, rows: int, accumulation: int = 1, T: int = 0):
    shape: dict[str, Any] = dict(depth=base.depth, vocab_size=base.vocab_size, T=T or base.max_seq_len, rows=rows)
    run: dict[str, Any] = dict(
        accumulation=accumulation, remat=settings.remat, fsdp=settings.fsdp, tensor=settings.tensor, fp8=settings.fp8
    )
    return compiled.Case(program=program, gpu=key, gpus=settings.gpus, recipe=settings.recipe, **shape, **run)


def _others(settings, key: str, base: BasePlan, rows: int, step, limit: int, say) -> list[dict[str, Any]]:
    """Evaluation and sampling, with the training state beside them."""
    evaluation = _case(settings, key, base, "evaluation", rows)
    sampling = _case(settings, key, base, "sampling", SLOTS, T=SLOT_TOKENS)
    try:
        found = compiled.results([evaluation, sampling], say)
    except (compiled.NoPlugin, compiled.CompileError) as error:
        return [{"name": "evaluation and sampling", "error": str(error)}]
    state = step["params_bytes"] + step["optimizer_bytes"]
    names = f"evaluation of {rows} rows", f"sampling of {SLOTS} answers of {SLOT_TOKENS:,} tokens on one GPU"
    besides = step["optimizer_bytes"], state  # an evaluation reads the parameters themselves, the sampler a copy
    needs = [facts["bytes"] + beside for facts, beside in zip(found, besides, strict=True)]
    return [{"name": n, "bytes": b, "fits": b <= limit} for n, b in zip(names, needs, strict=True)]


def _data(base: BasePlan) -> dict[str, Any]:
    """Shards to download and bytes on the disk: text, rows of tokens, checkpoints of the four stages (two each)."""
    shards = -(-int(base.total_tokens * CHARS_PER_TOKEN * SPARE_SHARDS / SHARD_CHARS) // 10) * 10 or 10
    token_bytes = 2 if base.vocab_size <= 65536 else 4
    checkpoint = 4 * (base.n_params + optimizer_numbers(base.config))
    parts = {
        "text_bytes": int((shards + 1) * SHARD_BYTES),
        "rows_bytes": base.total_tokens * token_bytes,
        "checkpoint_bytes": checkpoint,
        "checkpoints_bytes": 4 * 2 * checkpoint,
    }
    total = parts["text_bytes"] + parts["rows_bytes"] + parts["checkpoints_bytes"]
    return {"shards": shards, **parts, "disk_bytes": total}


def _step_facts(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """The compiled step's numbers without the list of single collectives, which are added up by kind."""
    if step is None:
        return None
    kinds: dict[tuple[str, bool], dict[str, Any]] = {}
    for c in step["collectives"]:
        entry = kinds.setdefault(
            (c["kind"], c["in_loop"]),
            {"kind": c["kind"], "in_loop": c["in_loop"], "operations": 0, "arrays": 0, "bytes": 0, "link_bytes": 0.0},
        )
        entry["operations"] += c["times"]
        entry["arrays"] += c["tensors"] * c["times"]
        entry["bytes"] += c["bytes"] * c["times"]
        entry["link_bytes"] += c["link_bytes"] * c["times"]
    return {**step, "collectives": list(kinds.values())}


# ---------------------------------------------------------------------------------------------------------------------
# as text


def describe(facts: dict[str, Any]) -> str:
    """The facts of `make` as a page of text."""
    gpu, data, time, c = facts["gpu"], facts["data"], facts["time"], facts["config"]
    rows = [
        ("model", f"depth {facts['depth']} ({facts['depth_from']}): width {c['n_embd']}, {c['n_head']} heads"),
        ("parameters", f"{facts['parameters']:,}"),
        ("recipe", facts["recipe"]),
        *([("scaling", _scaling_text(scaling))] if (scaling := facts["scaling"]) else []),
        ("tokens", f"{facts['tokens']:,} ({facts['tokens'] / facts['parameters']:.3g} per parameter)"),
        ("steps", f"{facts['steps']:,} of {facts['total_batch_size']:,} tokens"),
        ("FLOPs", f"{facts['flops']:.4g} ({facts['flops_per_token']:,} per token)"),
        ("download", f"{data['shards']} shards and the held-out one, about {_gb(data['text_bytes'])}"),
        (
            "disk",
            f"about {_gb(data['disk_bytes'])}: text, {_gb(data['rows_bytes'])} of token rows, two checkpoints of "
            f"{_gb(data['checkpoint_bytes'])} for each of four stages",
        ),
        (
            "GPUs",
            f"{gpu['count']} x {gpu['name']}: {_gib(gpu['memory_bytes'])} each, {_gib(gpu['usable_bytes'])} usable",
        ),
        ("mesh", ", ".join(f"{k} {v}" for k, v in facts["mesh"].items()) + f"; --remat={facts['remat']}"),
        ("memory", facts["memory_note"]),
    ]
    for size in facts["sizes"]:
        bound = f", step at least {_seconds(size['seconds_bound'])}" if size["seconds_bound"] else ""
        verdict = "fits" if size["fits"] else "DOES NOT FIT"
        rows.append(
            (
                f"  {size['rows']} rows a GPU",
                f"{_gib(size['bytes'])} ({'compiled' if size['compiled'] else 'estimated'}): {verdict}"
                f" ({size['accumulation']} micro-step{'s' if size['accumulation'] > 1 else ''}{bound})",
            )
        )
    if facts["device_batch_size"] is None:
        rows.append(("", "nothing fits: try --remat=block, --fsdp, a smaller depth or a larger card"))
    else:
        rows.append(("", f"the largest of these that fits is {facts['device_batch_size']}"))
    for other in facts["other_programs"]:
        verdict = other.get("error") or f"{_gib(other['bytes'])}: {'fits' if other['fits'] else 'DOES NOT FIT'}"
        rows.append((f"  {other['name'].split(' ')[0]}", f"{other['name']}: {verdict}"))
    if step := facts["step"]:
        rows.append(("collectives", f"per optimizer step and GPU, {_gb(step['link_bytes'])} over the links"))
        for kind in step["collectives"]:
            where = ", inside a loop" if kind["in_loop"] else ""
            rows.append(
                (
                    f"  {kind['kind']}",
                    f"{kind['operations']} operation(s) on {kind['arrays']} array(s), {_gb(kind['bytes'])}{where}",
                )
            )
        forward, backward = step["cudnn_attention"]
        rows.append(("attention", f"cuDNN: {forward} forward and {backward} backward calls in the program"))
        if found := step.get("float8_products"):
            rows.append(("float8", f"{found} matrix products in the program"))
    line = time["roofline"]
    alone = f"FLOPs alone {_seconds(line['compute'])}"
    if line["memory"] is not None:
        alone += f", memory traffic alone {_seconds(line['memory'])}"
    alone += f", links alone {_seconds(line['link'])}"
    rows += [
        (
            "step, bound",
            f"at least {_seconds(line['bound'])}, which would be {time['mfu_at_bound']:.0%} MFU ({alone})",
        ),
        (
            f"step, {time['mfu']:.0%} MFU",
            f"{_seconds(time['seconds_per_step'])}, {time['tokens_per_second']:,.0f} tokens a second (assumed: --mfu)",
        ),
        ("pretraining", f"{time['base_hours']:.2f} h at that rate; never below {time['base_hours_bound']:.2f} h"),
        (
            "everything",
            f"{time['hours']:.1f} h with the tokenizer, later stages and evaluations, as the reference's runs took",
        ),
        ("dollars", f"{facts['dollars']:,.0f} at {facts['price_per_gpu_hour']:g} per GPU and hour (--price)"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows) + (
        "\n\nPlanned, not measured: nothing ran on a GPU."
    )


def _scaling_text(scaling: dict[str, Any]) -> str:
    return (
        f"{scaling['parameters']:,} parameters count: {scaling['tokens']:,} tokens; learning rates x "
        f"{scaling['rates_factor']:.4g}, weight decay of the matrices {scaling['weight_decay']:.4g}"
    )


def _gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB"


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n:,.0f} bytes"


def _seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{s * 1000:.3g} ms"
