"""The accelerator step: PREPARED rows in, answer rows out, in their order.

Knows no ray and nothing of how the engine works (`rounds.py` asks it); every prompt that comes in,
but for those that are asked for the sake of others, leaves as exactly one row for each of its
samples.
"""

import datetime
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.asking import Asking, Vocabulary
from pipeline.engine.load import (
    device_of,
    end_tokens,
    load_family,
    load_model,
    load_processor,
)
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Engine
from pipeline.rounds import Rounds
from pipeline.script import scripts_of
from pipeline.talk import Scene, Talk, Task
from pipeline.tokenise import Tokeniser
from schemas.job import JobSpec
from schemas.tables import KEEP, LINE, PREPARED, SHARD, answered_schema, table_of

_SHARD, _LINE = [field.name for field in SHARD], [field.name for field in LINE]
_IMAGE = ("image_sha256", "image_width", "image_height")


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
        ends = end_tokens(model, processor)
        size = model.config.get_text_config().vocab_size
        words = Vocabulary(processor.tokenizer, size=size, eos=ends)
        askings = {
            unit: Asking(job, ask, words) for unit, ask in zip(job.units, job.ask, strict=True)
        }
        scripts = scripts_of(job)
        may_talk = any(script.is_talk for script in scripts.values())
        tokeniser = Tokeniser(job.model, processor) if may_talk else None
        self._scene = Scene(askings, scripts, tokeniser)
        engine: Engine = engine_of(
            model,
            eos_token_ids=ends,
            table=pixel_table(processor) if load_family(job.model).is_fast else None,
            processor=processor,
            attention=job.model.attention,
            resources=job.resources.generate,
        )
        self._rounds = Rounds(engine, askings=askings, image_token_id=processor.image_token_id)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select(PREPARED.names).to_pylist()
        talks = [[Talk(self._scene, row, line) for line in row["lines"] or ()] for row in rows]
        self._rounds.ask([talk for of_row in talks for talk in of_row])
        now = datetime.datetime.now(datetime.UTC)
        answers: list[dict[str, Any]] = []
        origin: list[int | None] = []
        n_lines = 0
        for row, of_row in zip(rows, talks, strict=True):
            if row["lines"] is None:
                answers.append({name: row[name] for name in _SHARD})
                origin.append(None)
            for talk in of_row:
                wanted = [task for task in talk.tasks if not task.prompt["is_extra"]]
                said = [each for task in wanted for each in self._answers(task)]
                common = {
                    **self._common(row, talk.line),
                    "answered_at": now,
                    "row_answers": len(said),
                }
                answers += [{**common, **each} for each in said]
                origin += [n_lines] * len(said)
                n_lines += 1
        table = table_of(answers, answered_schema({}))
        for name in self._keep:
            of_lines = pc.list_flatten(batch.column(KEEP + name))
            kept = of_lines.take(pa.array(origin, pa.int64()))
            table = table.append_column(KEEP + name, kept)
        return table.cast(answered_schema(self._keep))

    def _common(self, row: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        """What all answers of one line share."""
        model = self._job.model
        return {
            **{name: row[name] for name in (*_SHARD, *_IMAGE)},
            **{name: line[name] for name in _LINE},
            "attempts": 1,
            "model": f"{model.path}@{model.revision}" if model.revision else model.path,
            "run_id": self._run_id,
        }

    def _answers(self, task: Task) -> Iterator[dict[str, Any]]:
        """What is the task's own in each of its answer rows."""
        prompt = task.prompt
        columns = {name: prompt[name] for name in ("question_id", "turn", "question")}
        if self._job.output.prompts:
            columns["prompt"] = prompt["prompt"]
        if prompt["token_ids"] is not None:
            columns["prompt_tokens"] = len(prompt["token_ids"])
        assert task.columns is not None
        for number, answer in zip(task.samples, task.columns, strict=True):
            yield {**columns, "sample_number": number, **answer}
