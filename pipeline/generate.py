"""The accelerator step: PREPARED rows in, answer rows out, in their order.

Questions that share an image and a prefix (up to the last image token) go to the engine as one
request, whatever lines or rows they are of. Knows no ray and nothing of how the engine works; every
prompt that comes in leaves as exactly one row.
"""

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engine.load import device_of, end_tokens, load_model, load_processor
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Answer, Branch, Engine, ImagePixels, Outcome, Prefix, Request
from schemas.errors import RowError
from schemas.job import JobSpec
from schemas.tables import KEEP, LINE, PREPARED, SHARD, answered_schema, error_of, table_of

_SHARD, _LINE = [field.name for field in SHARD], [field.name for field in LINE]
_IMAGE = ("image_sha256", "image_width", "image_height")

TokenIds = tuple[int, ...]
Prompt = dict[str, Any]
"""A PROMPT struct; once the model has answered it, with an `outcome`."""


class Generate:
    """PREPARED rows to rows of `answered_schema(keep)`; end marks pass. Calls may overlap.

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

        from pipeline.engine.choose import engine_of

        device = device_of(job.model)
        if threads is not None and device.type == "cpu":
            # `threads` counts the cluster's CPUs; this machine may have fewer.
            torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
        processor = load_processor(job.model)
        model = load_model(job.model, device)
        self._job, self._keep, self._run_id = job, keep, run_id
        self._tokenizer = processor.tokenizer
        self._image_token_id: int = processor.image_token_id
        self._engine: Engine = engine_of(
            model,
            eos_token_ids=end_tokens(model, processor),
            table=pixel_table(processor),
            attention=job.model.attention,
            resources=job.resources.generate,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select(PREPARED.names).to_pylist()
        self._ask(rows)
        now = datetime.datetime.now(datetime.UTC)
        answers: list[dict[str, Any]] = []
        origin: list[int | None] = []
        n_lines = 0
        for row in rows:
            if row["lines"] is None:
                answers.append({name: row[name] for name in _SHARD})
                origin.append(None)
            for line in row["lines"] or ():
                common = {**self._common(row, line), "answered_at": now}
                answers += [{**common, **self._answer(prompt)} for prompt in line["prompts"]]
                origin += [n_lines] * len(line["prompts"])
                n_lines += 1
        table = table_of(answers, answered_schema({}))
        for name in self._keep:
            of_lines = pc.list_flatten(batch.column(KEEP + name))
            kept = of_lines.take(pa.array(origin, pa.int64()))
            table = table.append_column(KEEP + name, kept)
        return table.cast(answered_schema(self._keep))

    def _ask(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give every prompt that waits for the model its `outcome`."""
        images: dict[str, ImagePixels] = {}
        asked: dict[tuple[str, TokenIds], dict[Branch, list[Prompt]]] = {}
        for row in rows:
            waiting = _waiting(row)
            sha256 = row["image_sha256"]
            if waiting and sha256 not in images:
                images[sha256] = _image(row)
            for prompt in waiting:
                prefix, suffix = self._split(prompt["token_ids"])
                branches = asked.setdefault((sha256, prefix), {})
                # Decoding is greedy: the same question gets the same answer.
                branches.setdefault(Branch(suffix, prompt["max_new_tokens"]), []).append(prompt)
        answered = self._engine.submit(
            [
                Request(Prefix(prefix, [images[sha256]]), list(branches))
                for (sha256, prefix), branches in asked.items()
            ]
        )
        for branches, outcomes in zip(asked.values(), answered, strict=True):
            for prompts, outcome in zip(branches.values(), outcomes, strict=True):
                for prompt in prompts:
                    prompt["outcome"] = outcome

    def _split(self, ids: Sequence[int]) -> tuple[TokenIds, TokenIds]:
        """Up to and including the last image token, and the rest."""
        last = max(i for i, token in enumerate(ids) if token == self._image_token_id)
        return tuple(ids[: last + 1]), tuple(ids[last + 1 :])

    def _common(self, row: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
        """What all answers of one line share."""
        model = self._job.model
        return {
            **{name: row[name] for name in (*_SHARD, *_IMAGE)},
            **{name: line[name] for name in _LINE},
            "turn": 0,
            "sample_number": 0,
            "attempts": 1,
            "model": f"{model.path}@{model.revision}" if model.revision else model.path,
            "run_id": self._run_id,
            "row_answers": len(line["prompts"]),
        }

    def _answer(self, prompt: Prompt) -> dict[str, Any]:
        """What is the prompt's own in its answer row."""
        outcome: Outcome | None = prompt.get("outcome")
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


def _waiting(row: dict[str, Any]) -> list[Prompt]:
    """The prompts of all lines that the model is to answer."""
    prompts = (prompt for line in row["lines"] or () for prompt in line["prompts"])
    return [prompt for prompt in prompts if prompt["status"] is None]


def _image(row: dict[str, Any]) -> ImagePixels:
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixels_shape"]).copy()
    return ImagePixels(pixels, row["image_sha256"])
