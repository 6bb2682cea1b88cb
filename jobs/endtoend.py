"""`lavaflow bench --jobs`: the whole pipeline's answers a second over those of its engine alone.

A job runs as any other, from JPEGs in tar shards to the answer table, on a Ray of its own. Before
and after it, the engine alone gets the same prompts from memory, with nothing beside it. Rates of
the pipeline are from the first answer to the last one; what it takes to start is told separately.
"""

import datetime
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image
from rich.console import Console

from jobs.bench import Bench, build_engine, ran_against
from jobs.load import build_spec
from jobs.photos import SIZE, write_shards
from jobs.quick import CAPTION_PROMPT
from jobs.race import Say
from jobs.run import run_job
from jobs.subject import Subject, load_subject, save_random
from jobs.workload import noise
from pipeline.engine.pixels import resized
from pipeline.engine.request import Answer, Branch, ImagePixels, Prefix, Request
from pipeline.parts import ANSWERS
from pipeline.tokenise import Tokeniser
from schemas.ask import AskPrompt
from schemas.errors import JobError
from schemas.job import JobSpec, ModelSpec

QUESTION_TOKENS = 12
IMAGES_ALONE = 64
"""That the engine alone is given, at once."""


def measure_jobs(bench: Bench, *, say: Say) -> dict[str, Any]:
    """Rates and their quotient, as JSON. Answers end at end tokens, or after `bench.new_tokens`.

    Raises SpecError, and JobError where a row fails or there are too few for a rate.
    """
    with tempfile.TemporaryDirectory(prefix="lavaflow-bench-") as name:
        folder = Path(name)
        subject = _subject(bench, folder)
        job = _job(bench, subject, folder)
        ran = ran_against(subject, compiled=bench.compile)
        write_shards(folder / "photos", bench.images, seed=bench.seed)
        alone = [_alone(bench, subject, job, say)]
        started_at = datetime.datetime.now(datetime.UTC)
        record = run_job(job, address=None, console=Console(stderr=True)).record
        whole_run = datetime.datetime.now(datetime.UTC) - started_at
        pipeline = _pipeline(job, record, started_at)
        alone.append(_alone(bench, subject, job, say))
    engine = sum(alone) / len(alone)
    return {
        "benchmark": f"the whole pipeline against the engine alone, {bench.mode}",
        "fraction": round(pipeline["answers_per_s"] / engine, 4),
        "unit": "answers/s",
        "pipeline": {**pipeline, "whole_run_s": round(whole_run.total_seconds(), 3)},
        "engine": {"answers_per_s": round(engine, 3), "rounds": [round(r, 3) for r in alone]},
        "ok": True,
        "work": {
            "mode": bench.mode,
            "images": bench.images,
            "answers": bench.images * len(job.ask),
            "new_tokens": bench.new_tokens,
        },
        "ran": {**ran, "resources": record["resources"]},
    }


def _subject(bench: Bench, folder: Path) -> Subject:
    """What the job loads, and the engine alone; random weights are made a checkpoint first."""
    if bench.random is None:
        return bench.subject()
    save_random(folder / "model", bench.random, seed=bench.seed, dtype=bench.dtype)
    return load_subject(ModelSpec(path=str(folder / "model")))


def _job(bench: Bench, subject: Subject, folder: Path) -> JobSpec:
    asks = [CAPTION_PROMPT]
    if bench.mode == "vqa":
        asks = [_words(subject, number) for number in range(bench.questions)]
    data = {
        "name": "bench",
        "source": {"format": "webdataset", "path": str(folder / "photos")},
        "ask": [{"id": f"q{number}", "prompt": text} for number, text in enumerate(asks)],
        "model": {"path": subject.name, "dtype": subject.dtype},
        "generate": {"max_new_tokens": bench.new_tokens},
        "output": {"path": str(folder / "out")},
        "resources": {"generate": bench.resources.model_dump(exclude_defaults=True)},
    }
    return build_spec(data, origin="bench")


def _pipeline(
    job: JobSpec, record: Mapping[str, Any], started_at: datetime.datetime
) -> dict[str, Any]:
    """What became of the job. A batch's answers bear one time: those of the first are its start."""
    counts = record["counts"]
    if counts["failed"] or counts["skipped"]:
        raise JobError(f"not all rows of the job were answered: {record['failures']}")
    times = ds.dataset(f"{job.output.path}/{ANSWERS}").to_table(["answered_at"])["answered_at"]
    first, last = pc.min(times).as_py(), pc.max(times).as_py()
    later = pc.sum(pc.greater(times, pc.min(times))).as_py()
    if not later:
        raise JobError("all answers came in one batch, which gives no rate: raise --images")
    elapsed_s = (last - first).total_seconds()
    return {
        "answers_per_s": round(later / elapsed_s, 3),
        "first_to_last_s": round(elapsed_s, 3),
        "start_up_s": round((first - started_at).total_seconds(), 3),
    }


def _alone(bench: Bench, subject: Subject, job: JobSpec, say: Say) -> float:
    """Answers a second of the engine fed from memory, once it is warm."""
    engine = build_engine(subject, end_tokens=subject.end_tokens, resources=bench.resources)
    shape = resized(subject.processor, Image.new("RGB", SIZE)).shape
    images = noise(shape, min(bench.images, IMAGES_ALONE), seed=bench.seed)
    engine.submit(list(_requests(subject, job, images[:2], look="warm-up")))
    requests = list(_requests(subject, job, images, look="timed"))
    start = time.perf_counter()
    answered = engine.submit(requests)
    elapsed_s = time.perf_counter() - start
    for outcome in (outcome for outcomes in answered for outcome in outcomes):
        if not isinstance(outcome, Answer):
            raise JobError(f"the engine gave no answer: {type(outcome).__name__}: {outcome}")
    rate = len(images) * len(job.ask) / elapsed_s
    say(f"the engine alone: {rate:.1f} answers/s")
    return rate


def _requests(
    subject: Subject, job: JobSpec, images: Sequence[np.ndarray], *, look: str
) -> Iterator[Request]:
    """The job's prompts, as the generate actor puts them to its engine."""
    tokeniser = Tokeniser(job.model, subject.processor)
    branches = []
    for ask in job.ask:
        assert isinstance(ask, AskPrompt)
        ids = tokeniser.ids(tokeniser.render(ask.prompt), (tokeniser.image_tokens.of(SIZE),))
        split = len(ids) - ids[::-1].index(subject.vocabulary.image_token_id)
        branches.append(Branch(tuple(ids[split:]), job.decoding(ask).max_new_tokens))
    lead = tuple(ids[:split])
    for number, pixels in enumerate(images):
        yield Request(Prefix(lead, [ImagePixels(pixels, f"{look} {number}", SIZE)]), branches)


def _words(subject: Subject, number: int) -> str:
    tokenizer = subject.processor.tokenizer
    words = [f"w{number}"]
    while len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) < QUESTION_TOKENS:
        words.append(f"w{100 + (37 * number + 11 * len(words)) % 900}")
    return " ".join(words)
