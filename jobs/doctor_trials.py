"""What `doctor` tries a model at: batches against single prompts, and each way of running it here.

Each trial loads the model by itself and lets go of it, so that there is one at a time.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from jobs import agreement
from jobs.baseline import Baseline, Setting, Tokens
from jobs.race import tokens_of
from jobs.subject import Subject, load_subject
from jobs.workload import Workload
from pipeline.engine.choose import engine_of
from pipeline.engine.kv import WIDTH_STEP, Shape, rounded, shape_of
from pipeline.engine.memory import default_kv_budget_bytes, weights_bytes
from pipeline.engine.request import Engine
from schemas.ask import GenerateSpec
from schemas.errors import JobError, SpecError
from schemas.job import GenerateResources, ModelSpec

NARROW_ROWS = 2
"""Answers that fit the narrow room at a time: places are given up and taken over all the while."""

Report = dict[str, Any]


class Build(Protocol):
    def __call__(
        self, subject: Subject, *, attention: str = ..., resources: GenerateResources = ...
    ) -> Engine: ...


def build_engine(subject: Subject, **options: Any) -> Engine:
    """Without end tokens: every answer is as long as it may be. The model is changed in place."""
    return engine_of(subject.model, eos_token_ids=(), table=subject.table, **options)


@dataclass(frozen=True)
class Trials:
    """`work` is asked of the model of `spec` in every trial; its `device` is named."""

    spec: ModelSpec
    work: Workload
    build: Build = build_engine

    def exact(self) -> tuple[Report, list[Tokens]]:
        """In float32, token for token: what `agreement.exact` finds, and what was said."""
        with self._loaded(dtype="float32") as subject:
            baseline = self._baseline(subject)
            said = self._said(subject)
            found = agreement.exact(baseline, self.work.rows, dict(enumerate(said)))
            del baseline
        with self._loaded(dtype="float32") as subject:
            narrow = self._said(subject, resources=self._narrow(subject))
        found["others_in_a_small_room"] = _different(narrow, said)
        found["ok"] &= not found["others_in_a_small_room"]
        return found, said

    def wrong_when_padded_right(self, said: Sequence[Tokens]) -> int:
        """Answers of `generate` to all prompts in one batch; `said`: in float32."""
        rows = self.work.rows
        with self._loaded(dtype="float32") as subject:
            padded = self._baseline(subject).answer(rows, Setting(len(rows), padding="right"))
        return _different(padded, said)

    def dtype(
        self, name: str, *, exact: Sequence[Tokens] | None, quantized: Mapping[str, list[Tokens]]
    ) -> Report:
        """The engine's tokens put to transformers in the same dtype, and those of quantized models
        with them; `exact`: what is said in float32, where that is known."""
        try:
            with self._loaded(dtype=name) as subject:
                baseline = self._baseline(subject)
                said = self._said(subject)
                forced = {
                    key: agreement.forced(baseline, self.work.rows, dict(enumerate(tokens)))
                    for key, tokens in {"engine": said, **quantized}.items()
                }
                del baseline
        except (JobError, RuntimeError) as error:
            return {"works": False, "why": str(error)}
        report: Report = {"works": forced["engine"]["ok"], "answers": len(said), **forced["engine"]}
        if exact is not None:
            report["other_answers"] = _different(exact, said)
        report["quantized"] = {
            key: {"other_answers": _different(tokens, said), "forced": forced[key]}
            for key, tokens in quantized.items()
        }
        return report

    def attention(self, name: str, dtype: str, said: Sequence[Tokens] | None) -> Report:
        """`said`: in that dtype, by another attention; null where that is not known."""
        try:
            with self._loaded(dtype=dtype, attention=name) as subject:
                found = self._said(subject, attention=name)
        except (SpecError, JobError, RuntimeError) as error:
            return {"works": False, "why": str(error)}
        report: Report = {"works": True, "dtype": dtype}
        if said is not None:
            report["other_answers"] = _different(found, said)
        return report

    def quantization(self, name: str) -> tuple[Report, list[Tokens] | None]:
        """What it weighs, and what was said; null where it does not work."""
        try:
            with self._loaded(quantization=name) as subject:
                weigh = weights_bytes(subject.model)
                said = self._said(subject)
            with self._loaded(quantization=name) as subject:
                narrow = self._said(subject, resources=self._narrow(subject))
        except (SpecError, JobError, RuntimeError) as error:
            return {"works": False, "why": str(error)}, None
        others = _different(narrow, said)
        return {"works": True, "weights_bytes": weigh, "others_in_a_small_room": others}, said

    @contextlib.contextmanager
    def _loaded(self, **keys: str) -> Iterator[Subject]:
        subject = load_subject(ModelSpec.model_validate({**self.spec.model_dump(), **keys}))
        try:
            yield subject
        finally:
            _empty(subject.model)

    def _baseline(self, subject: Subject) -> Baseline:
        """To be had before an engine changes the model."""
        return Baseline(subject.model, self.work, subject.table)

    def _said(self, subject: Subject, **options: Any) -> list[Tokens]:
        return tokens_of(self.work, self.build(subject, **options).submit(self.work.requests(0)))

    def _narrow(self, subject: Subject) -> GenerateResources:
        longest = max(len(row.token_ids) + row.new_tokens for row in self.work.rows)
        bytes_of_one = (longest + 2 * WIDTH_STEP) * _shape(subject).token_bytes
        return GenerateResources(kv_budget_bytes=NARROW_ROWS * bytes_of_one, batch_size=NARROW_ROWS)


def memory(subject: Subject, work: Workload) -> Report:
    """What weights, images and questions take, and how many fit at once where nothing is said of
    `kv_budget_bytes`."""
    shape, budget = _shape(subject), default_kv_budget_bytes(subject.model.device)
    longest = max(len(branch.token_ids) for branches in work.branches for branch in branches)
    answer = GenerateSpec().max_new_tokens
    image = rounded(len(work.lead)) * shape.token_bytes
    question = rounded(longest + answer) * shape.token_bytes
    return {
        "weights_bytes": weights_bytes(subject.model),
        "kv_bytes_a_token": shape.token_bytes,
        "kv_bytes_an_image": image,
        "kv_bytes_a_question": question,
        "question_tokens": longest + answer,
        "kv_budget_bytes": budget,
        "images_at_once": budget // (image + question),
    }


def _empty(model: torch.nn.Module) -> None:
    """An engine's thread keeps its model for as long as the process lives: take the weights out."""
    for module in model.modules():
        # Of bitsandbytes, in 8 bits.
        state: Any = getattr(module, "state", None)
        if hasattr(state, "CB"):
            state.CB = None
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def _shape(subject: Subject) -> Shape:
    model = subject.model
    return shape_of(model.config.get_text_config(), dtype=model.dtype, device=model.device)


def _different(some: Sequence[Tokens], others: Sequence[Tokens]) -> int:
    return sum(a != b for a, b in zip(some, others, strict=True))
