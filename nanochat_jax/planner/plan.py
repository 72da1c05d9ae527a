"""From one dial to everything a pretraining run needs, printed before anything is spent."""

import math
from dataclasses import dataclass, replace
from typing import Any

from nanochat_jax.model.gpt import GPTConfig, flops_per_token, num_params
from nanochat_jax.model.parameters import MATRICES, leaves, num_scaling_params
from nanochat_jax.planner.scaling import Scaling, scaling
from nanochat_jax.training import optim
from nanochat_jax.utils.errors import UserError

DEPTH = 20
SEQUENCE_LEN = 2048
TOTAL_BATCH_SIZE = 524288  # tokens per optimizer step
TOKENS_PER_PARAMETER = 20.0

# What each recipe trains on where no flag says otherwise; a batch of AUTO tokens is derived from the model.
AUTO = -1
DEFAULTS: dict[str, dict[str, Any]] = {
    "v1": dict(vocab_size=65536, total_batch_size=TOTAL_BATCH_SIZE, target_param_data_ratio=TOKENS_PER_PARAMETER),
    "modern": dict(vocab_size=32768, total_batch_size=AUTO, target_param_data_ratio=12.0),
}


class PlanError(UserError, ValueError):
    """A run that cannot be; the message names the flag and a value that works."""


@dataclass(frozen=True)
class BasePlan:
    """A pretraining run, derived by `derive`. Every field is final but for the rows per device, which memory decides.

    Units: batch sizes of devices in rows, the total batch in tokens; FLOPs count forward and backward.
    """

    depth: int
    max_seq_len: int
    device_batch_size: int
    total_batch_size: int
    num_iterations: int
    horizon: str  # which flag decided num_iterations
    vocab_size: int
    devices: int  # that have rows of their own
    config: GPTConfig
    hyper: optim.OptimHyper
    tensor: int = 1  # devices that share the matrices and the rows of each of these
    scaling: Scaling | None = None  # by which `hyper` is scaled, in the modern recipe

    @classmethod
    def derive(
        cls,
        *,
        depth: int,
        vocab_size: int,
        max_seq_len: int = SEQUENCE_LEN,
        device_batch_size: int = 32,
        total_batch_size: int = TOTAL_BATCH_SIZE,
        num_iterations: int = -1,
        target_flops: float = -1.0,
        target_param_data_ratio: float = TOKENS_PER_PARAMETER,
        devices: int = 1,
        tensor: int = 1,
        hyper: optim.OptimHyper | None = None,
        scale_rates: bool = True,
    ) -> "BasePlan":
        """The plan of the reference's rules for the recipe of `hyper`. The arguments are the flags of those names;
        `devices` counts those that have rows of their own. Raises PlanError for anything that cannot work.

        The horizon is the first that applies: num_iterations if positive; round(target_flops / FLOPs per step) if
        positive; floor(target_param_data_ratio * parameters / total_batch_size), of all parameters in v1, of the
        matrices and lm_head in the modern recipe. In the latter the batch may be AUTO, and learning rates and weight
        decay are multiplied as `scaling` has it, unless `scale_rates` is off.
        """
        hyper = hyper or optim.OptimHyper()
        modern = hyper.recipe == "modern"
        for name, value in (("depth", depth), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise PlanError(f"--{name} must be at least 1, got {value}")
        config = GPTConfig.from_depth(depth, vocab_size, max_seq_len, "modern" if modern else "v1")
        scaled = None
        if modern:
            scaled = scaling(config, target_param_data_ratio, None if total_batch_size == AUTO else total_batch_size)
            total_batch_size = scaled.total_batch_size
        for name, value in (("device_batch_size", device_batch_size), ("total_batch_size", total_batch_size)):
            if value < 1:
                raise PlanError(f"--{name} must be at least 1, got {value}")
        check_batch(total_batch_size, device_batch_size, max_seq_len, devices)
        steps, horizon = _horizon(
            config, total_batch_size, num_iterations, target_flops, target_param_data_ratio, modern
        )
        try:
            optim.lr_schedule(hyper, steps)
        except ValueError as error:
            raise PlanError(f"--{error}") from None
        if scaled and scale_rates:
            hyper = scaled.applied(hyper)
        shape = depth, max_seq_len, device_batch_size, total_batch_size
        return cls(*shape, steps, horizon, vocab_size, devices, config, hyper, tensor, scaled if scale_rates else None)

    def with_rows(self, rows: int) -> "BasePlan":
        """The same plan with so many rows per device and micro-step. PlanError if they do not divide the batch."""
        check_batch(self.total_batch_size, rows, self.max_seq_len, self.devices)
        return replace(self, device_batch_size=rows)

    @property
    def n_params(self) -> int:
        """All parameters, embeddings included."""
        return num_params(self.config)

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that all devices together take in one micro-step."""
        return self.device_batch_size * self.max_seq_len * self.devices

    @property
    def grad_accum(self) -> int:
        """Micro-steps per optimizer step."""
        return self.total_batch_size // self.micro_batch_tokens

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> int:
        return self.flops_per_token * self.total_tokens

    @property
    def lr_scale(self) -> float:
        """The factor of the width on both AdamW learning rates."""
        return optim.width_scale(self.config.n_embd)

    def state_bytes(self) -> int:
        """Bytes of float32 parameters, gradients and optimizer state on each device (activations come on top).

        Parameters and gradients are unsharded on every device; moments are sharded over the devices.
        """
        return 4 * (2 * self.n_params + math.ceil(optimizer_numbers(self.config) / self.devices))

    def describe(self) -> str:
        """The whole plan as a table of text."""
        c, hyper = self.config, self.hyper
        rates = optim.initial_learning_rates(hyper, c.n_embd)
        warmup = hyper.warmup_steps or round(hyper.warmup_ratio * self.num_iterations)
        warmdown = round(hyper.warmdown_ratio * self.num_iterations)
        sharing = f"{self.devices} devices" if self.devices > 1 else "1 device"
        held = f"{_bytes(self.state_bytes())} of parameters and training state on each"
        if self.tensor > 1:
            sharing = f"{self.devices} group{'s' if self.devices > 1 else ''} of {self.tensor} devices"
            held = f"{_bytes(self.state_bytes())} of parameters and training state in each group of {self.tensor}"
        scaled = f"base rate x {self.lr_scale:.4f} for width {c.n_embd}"
        rows = [
            ("model", f"depth {self.depth}: {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads of {c.head_dim}"),
            ("vocabulary", f"{self.vocab_size:,}"),
            ("context", f"{self.max_seq_len:,} tokens"),
            ("parameters", f"{self.n_params:,} ({matrix_params(c):,} in matrices)"),
            ("FLOPs per token", f"{self.flops_per_token:,} (forward and backward)"),
            ("devices", f"{self.devices * self.tensor}, with {held}"),
            (
                "batch",
                f"{self.total_batch_size:,} tokens = {self.device_batch_size} rows x {self.max_seq_len:,} tokens x "
                f"{sharing} x {self.grad_accum} accumulated",
            ),
            ("steps", f"{self.num_iterations:,} (from --{self.horizon})"),
            ("tokens", f"{self.total_tokens:,} ({self.total_tokens / self.n_params:.3g} per parameter)"),
            ("FLOPs", f"{self.total_flops:.4g}"),
            ("embedding lr", f"{rates['embedding']:.5g} ({scaled})"),
            ("unembedding lr", f"{rates['unembedding']:.5g} ({scaled})"),
            ("matrix lr", f"{rates['matrices']:.5g} (Muon, not scaled by the width)"),
            *self._weight_decay_and_scaling(),
            (
                "schedule",
                f"{warmup:,} steps up, constant, {warmdown:,} steps down to {hyper.final_lr_frac:g} of the rate",
            ),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _weight_decay_and_scaling(self) -> list[tuple[str, str]]:
        scaled, decay = self.scaling, self.hyper.weight_decay
        if self.hyper.recipe != "modern":
            return [("weight decay", f"{decay:g} (embeddings)")]
        if scaled is None:
            return [("weight decay", f"{decay:g} (matrices, along a cosine to 0; not scaled)")]
        derived = f"rates x {scaled.rates:.4f}, weight decay x {scaled.weight_decay:.4g}"
        return [
            ("weight decay", f"{self.hyper.weight_decay:.5g} (matrices, along a cosine to 0)"),
            ("scaling", f"{num_scaling_params(self.config):,} parameters count; relative to depth 12: {derived}"),
        ]


def matrix_params(config: GPTConfig) -> int:
    """Parameters that Muon trains."""
    return sum(math.prod(leaf.shape) for leaf in leaves(config) if leaf.kind.group == MATRICES)


def optimizer_numbers(config: GPTConfig) -> int:
    """How many numbers the optimizer keeps: one momentum of each matrix, two moments of everything else."""
    return 2 * num_params(config) - matrix_params(config)


def _horizon(
    config: GPTConfig, total_batch_size: int, num_iterations: int, target_flops: float, ratio: float, modern: bool
) -> tuple[int, str]:
    if num_iterations > 0:
        return num_iterations, "num_iterations"
    if num_iterations != -1:
        raise PlanError(f"--num_iterations must be positive, or -1 to derive it, got {num_iterations}")
    if target_flops > 0:
        per_step = flops_per_token(config) * total_batch_size
        steps = round(target_flops / per_step)
        if steps < 1:
            raise PlanError(
                f"--target_flops={target_flops:g} buys no step: one takes {per_step:.4g} FLOPs. Give at least that, or "
                "a smaller --total_batch_size or --depth"
            )
        return steps, "target_flops"
    if ratio <= 0:
        usual = DEFAULTS["modern" if modern else "v1"]["target_param_data_ratio"]
        raise PlanError(
            f"nothing says how long to train: --num_iterations and --target_flops are off and "
            f"--target_param_data_ratio is {ratio:g}; make one of them positive ({usual:g} tokens per "
            "parameter is usual)"
        )
    parameters = num_scaling_params(config) if modern else num_params(config)
    steps = int(ratio * parameters) // total_batch_size
    if steps < 1:
        raise PlanError(
            f"--target_param_data_ratio={ratio:g} gives {ratio * parameters:,.0f} tokens, less than one step of "
            f"--total_batch_size={total_batch_size:,}; raise the ratio or lower the batch, or give --num_iterations"
        )
    return steps, "target_param_data_ratio"


def check_batch(total: int, device_batch_size: int, max_seq_len: int, devices: int) -> None:
    """The total batch must be a whole number of micro-steps over all devices."""
    row = max_seq_len * devices
    micro = device_batch_size * row
    if total % micro == 0:
        return
    lower, upper = total // micro * micro, -(-total // micro) * micro
    totals = f"{lower} or {upper}" if lower else f"{upper}"
    message = (
        f"--total_batch_size={total} is no multiple of the {micro} tokens of one micro-step ({device_batch_size} rows "
        f"x {max_seq_len} tokens x {devices} devices); use --total_batch_size={totals}"
    )
    if total % row == 0:
        valid = [d for d in range(1, total // row + 1) if (total // row) % d == 0]
        near = [max((d for d in valid if d < device_batch_size), default=None)]
        near.append(min((d for d in valid if d > device_batch_size), default=None))
        message += f", or --device_batch_size={' or '.join(str(d) for d in near if d is not None)}"
    raise PlanError(message)


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.4g} {unit}"
