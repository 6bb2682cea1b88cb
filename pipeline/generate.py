"""The accelerator step: PREPARED rows in, answer rows out, in their order.

Questions that share a prefix (up to the last image token) go to the engine as one request. Knows
no ray and nothing of how the engine works; every prompt that comes in leaves as exactly one row.
"""

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine.load import device_of, load_model, load_processor
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Answer, Branch, Engine, ImagePixels, Outcome, Prefix, Request
from schemas.errors import RowError
from schemas.job import JobSpec
from schemas.tables import KEEP, PREPARED, answered_schema, error_of, table_of

Prompt = dict[str, Any]
"""A PROMPT struct."""


class Generate:
    """PREPARED rows to rows of `answered_schema(keep)`; end marks pass.

    `threads`: compute threads, where the model runs on the CPU; null leaves torch's own number.
    """

    def __init__(
        self,
        job: JobSpec,
        keep: Mapping[str, pa.DataType],
        *,
        run_id: str,
        threads: int | None = None,
    ) -> None:
        # Threads that spin while they wait for each other stand still when another process wants
        # the core: 30 times slower, measured on two busy cores. OpenMP reads this when torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        from pipeline.engine.plain import PlainEngine

        device = device_of(job.model)
        if threads is not None and device.type == "cpu":
            # `threads` counts the cluster's CPUs; this machine may have fewer.
            torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
        processor = load_processor(job.model)
        model = load_model(job.model, device)
        self._job, self._keep, self._run_id = job, keep, run_id
        self._tokenizer = processor.tokenizer
        self._image_token_id: int = processor.image_token_id
        self._engine: Engine = PlainEngine(
            model,
            eos_token_ids=_end_tokens(model, processor),
            table=pixel_table(processor),
            batch_size=job.resources.generate.batch_size,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select(PREPARED.names).to_pylist()
        outcomes = self._submit(rows)
        now = datetime.datetime.now(datetime.UTC)
        answers: list[dict[str, Any]] = []
        origin: list[int] = []
        for index, row in enumerate(rows):
            if row["source_index"] is None:
                answers.append(_end_mark(row))
                origin.append(index)
            for number, prompt in enumerate(row["prompts"] or ()):
                answer = self._answer(prompt, outcomes.get((index, number)))
                answers.append({**self._common(row), "answered_at": now, **answer})
                origin.append(index)
        table = table_of(answers, answered_schema({}))
        for name in self._keep:
            kept = batch.column(KEEP + name).take(pa.array(origin, pa.int64()))
            table = table.append_column(KEEP + name, kept)
        return table.cast(answered_schema(self._keep))

    def _submit(self, rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int], Outcome]:
        """The outcome of every prompt that waits for one, by (row, prompt) number."""
        requests: list[Request] = []
        places: list[list[tuple[int, int]]] = []
        for index, row in enumerate(rows):
            for request, numbers in self._requests(row):
                requests.append(request)
                places.append([(index, number) for number in numbers])
        answered = self._engine.submit(requests)
        return {
            place: outcome
            for group, outcomes in zip(places, answered, strict=True)
            for place, outcome in zip(group, outcomes, strict=True)
        }

    def _requests(self, row: dict[str, Any]) -> Iterator[tuple[Request, list[int]]]:
        """The row's open prompts grouped by prefix, and the numbers of the prompts of each."""
        groups: dict[tuple[int, ...], list[tuple[int, Branch]]] = {}
        for number, prompt in enumerate(row["prompts"] or ()):
            if prompt["status"] is None:
                prefix, suffix = self._split(prompt["token_ids"])
                branch = Branch(suffix, prompt["max_new_tokens"])
                groups.setdefault(prefix, []).append((number, branch))
        if not groups:
            return
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixels_shape"]).copy()
        image = ImagePixels(pixels, row["image_sha256"])
        for prefix, members in groups.items():
            branches = [branch for _, branch in members]
            yield Request(Prefix(prefix, [image]), branches), [number for number, _ in members]

    def _split(self, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Up to and including the last image token, and the rest."""
        last = max(i for i, token in enumerate(ids) if token == self._image_token_id)
        return tuple(ids[: last + 1]), tuple(ids[last + 1 :])

    def _common(self, row: dict[str, Any]) -> dict[str, Any]:
        """What all answers of one source row share."""
        model = self._job.model
        same = ["source_uri", "source_index", "shard_identity", "rows_total", "sample_id", "units"]
        same += ["image_sha256", "image_width", "image_height"]
        return {
            **{name: row[name] for name in same},
            "turn": 0,
            "sample_number": 0,
            "attempts": 1,
            "model": f"{model.path}@{model.revision}" if model.revision else model.path,
            "run_id": self._run_id,
            "row_answers": len(row["prompts"]),
        }

    def _answer(self, prompt: Prompt, outcome: Outcome | None) -> dict[str, Any]:
        """What is the prompt's own in its answer row; `outcome` is null where it was settled."""
        columns = {"question_id": prompt["question_id"], "question": prompt["question"]}
        if self._job.output.prompts:
            columns["prompt"] = prompt["prompt"]
        if prompt["token_ids"] is not None:
            columns["prompt_tokens"] = len(prompt["token_ids"])
        if isinstance(outcome, Answer):
            text = self._tokenizer.decode(list(outcome.token_ids), skip_special_tokens=True)
            return {
                **columns,
                "answer": text.strip(),
                "status": "ok",
                "finish_reason": outcome.finish_reason,
                "output_tokens": outcome.output_tokens,
                "mean_logprob": outcome.mean_logprob,
            }
        if isinstance(outcome, RowError):
            return {**columns, **_error_columns("failed", error_of(outcome))}
        return {**columns, **_error_columns(prompt["status"], prompt["error"])}


def _error_columns(status: str, error: Mapping[str, str] | None) -> dict[str, Any]:
    said = error or {}
    return {
        "status": status,
        "error_stage": said.get("stage"),
        "error_class": said.get("class"),
        "error_message": said.get("message"),
    }


def _end_mark(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("source_uri", "shard_identity", "rows_total")}


def _end_tokens(model: Any, processor: Any) -> list[int]:
    """The ids that end an answer: those of the generation config, else the tokenizer's."""
    named = model.generation_config.eos_token_id
    if named is None:
        named = processor.tokenizer.eos_token_id
    return [] if named is None else [named] if isinstance(named, int) else list(named)
