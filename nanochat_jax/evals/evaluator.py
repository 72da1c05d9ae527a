"""A model under evaluation: runs any one evaluation by its name."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax

import tasks
from nanochat_jax.data.build_rows import build_rows, packing_of
from nanochat_jax.data.conversation_rows import build_conversation_rows
from nanochat_jax.data.loader import val_batches
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.data.sources import text_source
from nanochat_jax.evals import core, samples
from nanochat_jax.evals.bpb import held_out_loss
from nanochat_jax.evals.chat_eval import (
    categorical_settings,
    eval_engine,
    evaluate_categorical,
    evaluate_generative,
    generative_settings,
    longest_prompt,
    problem_count,
)
from nanochat_jax.evals.core_bundle import Bundle, open_bundle
from nanochat_jax.evals.results import Result
from nanochat_jax.evals.scorer import Scorer
from nanochat_jax.evals.settings import BUILT_IN, EvalSettings
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import SamplingParams
from nanochat_jax.model.gpt import GPTConfig, Params
from nanochat_jax.parallel import sharding
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.progress import ProblemsProgress, RowsProgress, ShareProgress
from tasks import demo_world

LONGEST_ANSWER, LONGEST_ANSWER_DEMO = 512, 128


class Evaluator:
    """A model under evaluation and what its evaluations share: data, a scorer, an engine, their compiled programs.

    trained_with: the settings the run was trained with (the demo's flag, the model's name, the text). Assign `params`
    to evaluate other parameters of the same configuration; nothing is compiled again.
    """

    def __init__(
        self,
        config: GPTConfig,
        params: Params,
        tokenizer: Tokenizer,
        stage: str,
        settings: EvalSettings,
        trained_with: Mapping[str, Any] | None = None,
    ):
        self.config, self.tokenizer, self.stage, self.settings = config, tokenizer, stage, settings
        self.trained_with = trained_with or {}
        self.demo = bool(self.trained_with.get("demo"))
        self.params = params
        self._mesh = sharding.make_mesh() if len(jax.devices()) > 1 else None
        self._loaded: dict[str, Any] = {}
        self._rows: dict[str, RowSet] = {}
        self._engine: Engine | None = None
        self._made_scorer: Scorer | None = None

    # --- what is evaluated ------------------------------------------------------------------------------------------

    def task(self, name: str) -> Any:
        """The held-out task of this name."""
        if name not in self._loaded:
            s = self.settings
            if name.startswith("world/"):
                options: dict[str, Any] = {"model_name": self._model_name} if name == "world/identity" else {}
                self._loaded[name] = demo_world.load(name, "val", **options)
            else:
                options = {"strict": s.strict} if name in ("GSM8K", "HumanEval", "SpellingBee") else {}
                options |= {"allow_unsafe_code": s.allow_unsafe_code} if name == "HumanEval" else {}
                self._loaded[name] = tasks.load(name, "test", s.task_data, **options)
        return self._loaded[name]

    @property
    def _model_name(self) -> str:
        return self.trained_with.get("model_name") or demo_world.NAME

    @cached_property
    def bundle(self) -> Bundle:
        return open_bundle(self.settings.eval_bundle)

    def rows(self, name: str) -> RowSet:
        """Held-out token rows for bits per byte: of text ("bpb") or of the assistant's part of conversations."""
        if name not in self._rows:
            s, T = self.settings, self.config.sequence_len
            most = -(-s.eval_tokens // T)
            with RowsProgress(f"{name}: held-out rows", most) as progress:
                if name == "bpb":
                    data = s.data or ("" if self.demo else self.trained_with.get("data") or "")
                    recipe = self.trained_with.get("recipe") or "v1"
                    source = text_source(data, self.demo and not data, s.text_column, recipe=recipe)
                    packing = packing_of(recipe, self.trained_with.get("off") or "")
                    how: Any = dict(split="val", packing=packing, max_rows=most, progress=progress)
                    self._rows[name] = build_rows(source.val, self.tokenizer, T, **how)
                else:
                    chats = (
                        demo_world.sft_mixture("val", model_name=self._model_name)
                        if self.demo
                        else self.task("SmolTalk")
                    )
                    self._rows[name] = build_conversation_rows(
                        chats, self.tokenizer, T, packing="best_fit", split="val", max_rows=most, progress=progress
                    )
        return self._rows[name]

    def settings_of(self, name: str) -> dict[str, Any]:
        """What decides a result besides the model; opens the data, so that what is missing is said early."""
        s = self.settings
        if name == "CORE":
            return {"max_per_task": s.max_per_task, "bundle": self.bundle.sha256}
        if name in ("bpb", "chat-bpb"):
            return {"rows": self.rows(name).key}
        if name == "samples":
            return {"max_new_tokens": samples.TEXT_TOKENS if self.stage == "base" else samples.ANSWER_TOKENS}
        task = self.task(name)
        if task.eval_type == "categorical":
            return categorical_settings(task, s.max_problems)
        return generative_settings(task, max_problems=s.max_problems, **self._sampling)

    @property
    def _sampling(self) -> dict[str, Any]:
        s = self.settings
        longest = s.max_new_tokens or (LONGEST_ANSWER_DEMO if self.demo else LONGEST_ANSWER)
        return {
            "num_samples": s.num_samples, "max_new_tokens": longest, "temperature": s.temperature, "top_k": s.top_k,
            "seed": s.seed,
        }  # fmt: skip

    def prepare(self, names: Sequence[str]) -> None:
        """Sizes one engine for all open tasks among the names. Without it each new longest prompt makes another."""
        open_tasks = [self.task(n) for n in names if n not in BUILT_IN and self.task(n).eval_type == "generative"]
        if open_tasks:
            self._engine_for(open_tasks)

    # --- evaluating -------------------------------------------------------------------------------------------------

    def evaluate(
        self, name: str, *, partial: Result | None = None, save: Callable[[Result], Any] = lambda result: None
    ) -> Result:
        """The result of one name. CORE resumes from a `partial` result and hands `save` one after each of its tasks."""
        if name == "CORE":
            return self._core(partial, save)
        if name in ("bpb", "chat-bpb"):
            return self._bits(name)
        if name == "samples":
            return self._samples()
        task, s = self.task(name), self.settings
        with ProblemsProgress(name) as progress:
            if task.eval_type == "categorical":
                return evaluate_categorical(
                    self._scorer, self.tokenizer, task, max_problems=s.max_problems, progress=progress
                )
            engine = self._engine_for([task])
            engine.params = self.params
            return evaluate_generative(
                engine, self.tokenizer, task, max_problems=s.max_problems, progress=progress, **self._sampling
            )

    @property
    def _scorer(self) -> Scorer:
        if self._made_scorer is None:
            self._made_scorer = Scorer(self.config, self._spread, mesh=self._mesh)
        self._made_scorer.params = self._spread
        return self._made_scorer

    @property
    def _spread(self) -> Params:
        """The parameters on all devices."""
        if self._mesh is None:
            return self.params
        return jax.device_put(self.params, sharding.named(self._mesh, sharding.replicated_spec()))

    def _engine_for(self, open_tasks: Sequence[Any]) -> Engine:
        s = self.settings
        longest = max(longest_prompt(self.tokenizer, task, s.max_problems) for task in open_tasks)
        new, rotary = self._sampling["max_new_tokens"], 10 * self.config.sequence_len
        if self._engine is None or self._engine.capacity < min(longest + new, rotary):
            rows = max(problem_count(task, s.max_problems) for task in open_tasks) * s.num_samples
            devices = None if self._mesh is None or jax.process_count() > 1 else list(self._mesh.devices.flat)
            slots = s.batch_size or None
            self._engine = eval_engine(
                self.config, self.params, self.tokenizer, longest, new, rows=rows, slots=slots, devices=devices
            )
        return self._engine

    def _bits(self, name: str) -> Result:
        began, rows = time.monotonic(), self.rows(name)
        per_device = max(1, 4096 // rows.T) if jax.default_backend() == "cpu" else 32
        batch = per_device * (self._mesh.size if self._mesh else 1)
        loss = held_out_loss(
            self.config, self._spread, val_batches(rows, batch), self.tokenizer.token_bytes(), self._mesh
        )
        return {
            "task": name,
            "kind": "bpb",
            "bpb": loss["val_bpb"],
            "loss": loss["val_loss"],
            "interval": None,
            "n": len(rows),
            "tokens": len(rows) * rows.T,
            "settings": self.settings_of(name),
            "seconds": round(time.monotonic() - began, 3),
        }

    def _samples(self) -> Result:
        began, settings = time.monotonic(), self.settings_of("samples")
        if self.stage == "base":
            texts, prompts = samples.TEXTS, samples.text_prompts(self.tokenizer)
        else:
            texts, prompts = samples.QUESTIONS, samples.chat_prompts(self.tokenizer)
        longest, new = max(map(len, prompts)), settings["max_new_tokens"]
        engine = eval_engine(self.config, self.params, self.tokenizer, longest, new, rows=len(prompts))
        completions = engine.generate(prompts, SamplingParams(new, temperature=0.0))
        return {
            "task": "samples",
            "kind": "samples",
            "settings": settings,
            "n": len(prompts),
            "seconds": round(time.monotonic() - began, 3),
            "items": [
                {"id": str(i), "prompt": text, "completion": completion.text}
                for i, (text, completion) in enumerate(zip(texts, completions, strict=True))
            ],
        }

    def _core(self, partial: Result | None, save: Callable[[Result], Any]) -> Result:
        began, settings = time.monotonic(), self.settings_of("CORE")
        earlier = partial if partial and partial["settings"] == settings else {"tasks": {}, "seconds": 0.0}

        def result(part: dict[str, Any]) -> Result:
            seconds = round(earlier["seconds"] + time.monotonic() - began, 3)
            return {"task": "CORE", "kind": "core", "settings": settings, "seconds": seconds, **part}

        with ShareProgress("CORE") as progress:
            found = core.evaluate_core(
                self._scorer, self.tokenizer, self.bundle, max_per_task=self.settings.max_per_task,
                done=earlier["tasks"], save=lambda part: save(result(part)), progress=progress,
            )  # fmt: skip
        return result(found)
