"""The accelerator step: PREPARED rows in, answer rows out, in their order.

Questions that share an image and a prefix (up to the last image token) go to the engine as one
request, whatever lines or rows they are of. Knows no ray and nothing of how the engine works; every
prompt that comes in leaves as exactly one row.
"""

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.asking import TURN, Asking, Vocabulary, unasked
from pipeline.engine.load import device_of, end_tokens, load_model, load_processor
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Branch, Engine, ImagePixels, Outcome, Prefix, Request
from pipeline.tokenise import alike
from schemas.job import JobSpec
from schemas.tables import KEEP, LINE, PREPARED, SHARD, answered_schema, table_of

_SHARD, _LINE = [field.name for field in SHARD], [field.name for field in LINE]
_IMAGE = ("image_sha256", "image_width", "image_height")

TokenIds = tuple[int, ...]
Prompt = dict[str, Any]
"""A PROMPT struct; once the model has answered it, with `outcomes`."""
_Place = tuple[list[Outcome | None], int]
"""Where an outcome belongs."""


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
        self._image_token_id: int = processor.image_token_id
        ends = end_tokens(model, processor)
        size = model.config.get_text_config().vocab_size
        words = Vocabulary(processor.tokenizer, size=size, eos=ends)
        self._askings = {
            unit: Asking(job, ask, words) for unit, ask in zip(job.units, job.ask, strict=True)
        }
        self._engine: Engine = engine_of(
            model,
            eos_token_ids=ends,
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
                said = [each for prompt in line["prompts"] for each in self._answers(prompt)]
                common = {**self._common(row, line), "answered_at": now, "row_answers": len(said)}
                answers += [{**common, **each} for each in said]
                origin += [n_lines] * len(said)
                n_lines += 1
        table = table_of(answers, answered_schema({}))
        for name in self._keep:
            of_lines = pc.list_flatten(batch.column(KEEP + name))
            kept = of_lines.take(pa.array(origin, pa.int64()))
            table = table.append_column(KEEP + name, kept)
        return table.cast(answered_schema(self._keep))

    def _ask(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give every prompt that waits for the model its `outcomes`."""
        images: dict[str, ImagePixels] = {}
        asked: dict[tuple[str, TokenIds], dict[Branch, list[_Place]]] = {}
        for row in rows:
            waiting = _waiting(row)
            sha256 = row["image_sha256"]
            if waiting and sha256 not in images:
                images[sha256] = _image(row)
            for line, prompt in waiting:
                prefix = self._prefix(prompt["token_ids"])
                branches = asked.setdefault((sha256, prefix), {})
                place = [row["source_uri"], line["source_index"]]
                asking = self._askings[prompt["unit"]]
                own = asking.branches(prompt, place, start=len(prefix))
                prompt["outcomes"] = [None] * len(own)
                for number, branch in enumerate(own):
                    # Without chance, the same question gets the same answer.
                    branches.setdefault(branch, []).append((prompt["outcomes"], number))
        answered = self._engine.submit(
            [
                _request(prefix, list(branches), image=images[sha256])
                for (sha256, prefix), branches in asked.items()
            ]
        )
        for branches, outcomes in zip(asked.values(), answered, strict=True):
            for places, outcome in zip(branches.values(), outcomes, strict=True):
                for found, number in places:
                    found[number] = outcome

    def _prefix(self, ids: Sequence[int]) -> TokenIds:
        """Up to and including the last image token."""
        last = max(i for i, token in enumerate(ids) if token == self._image_token_id)
        return tuple(ids[: last + 1])

    def _common(self, row: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
        """What all answers of one line share."""
        model = self._job.model
        return {
            **{name: row[name] for name in (*_SHARD, *_IMAGE)},
            **{name: line[name] for name in _LINE},
            "turn": TURN,
            "attempts": 1,
            "model": f"{model.path}@{model.revision}" if model.revision else model.path,
            "run_id": self._run_id,
        }

    def _answers(self, prompt: Prompt) -> Iterator[dict[str, Any]]:
        """What is the prompt's own in each of its answer rows."""
        columns = {"question_id": prompt["question_id"], "question": prompt["question"]}
        if self._job.output.prompts:
            columns["prompt"] = prompt["prompt"]
        if prompt["token_ids"] is not None:
            columns["prompt_tokens"] = len(prompt["token_ids"])
        if prompt["unit"] is None:
            answers = iter([unasked(prompt)])
        else:
            answers = self._askings[prompt["unit"]].answers(prompt, prompt.get("outcomes", ()))
        for number, answer in enumerate(answers):
            yield {**columns, "sample_number": number, **answer}


def _waiting(row: dict[str, Any]) -> list[tuple[dict[str, Any], Prompt]]:
    """The prompts of all lines that the model is to answer, each with its line."""
    prompts = ((line, prompt) for line in row["lines"] or () for prompt in line["prompts"])
    return [(line, prompt) for line, prompt in prompts if prompt["status"] is None]


def _request(prefix: TokenIds, branches: Sequence[Branch], *, image: ImagePixels) -> Request:
    """What all branches begin with becomes part of the prefix, and is read once."""
    unscored = [tuple(_unscored(branch)) for branch in branches]
    shared = alike(min(unscored), max(unscored))
    if len(branches) > 1 and shared > 1:
        # A branch keeps the token at which it is answered.
        prefix = (*prefix, *branches[0].token_ids[: shared - 1])
        branches = [replace(b, token_ids=b.token_ids[shared - 1 :]) for b in branches]
    return Request(Prefix(prefix, [image]), branches)


def _unscored(branch: Branch) -> Sequence[int]:
    return branch.token_ids[: len(branch.token_ids) - branch.scored]


def _image(row: dict[str, Any]) -> ImagePixels:
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixels_shape"]).copy()
    return ImagePixels(pixels, row["image_sha256"], (row["image_width"], row["image_height"]))
