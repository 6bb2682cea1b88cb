"""`lavaflow bench`: how much faster than transformers' `generate` the engine is, and whether it is
right.

Both get the same weights, threads, images, prompts and lengths of answers, in one process, and
take turns.
"""

import functools
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from jobs import agreement
from jobs.baseline import Baseline, Setting, twin
from jobs.race import Race, Say, tokens_of
from jobs.subject import Subject, load_subject, random_subject
from jobs.workload import Mode, Workload, captions, noise, questions
from pipeline.engine.choose import engine_of
from pipeline.engine.reference import cast
from pipeline.engine.request import Engine
from schemas.job import GenerateResources, ModelSpec

VERSIONS = ("lavaflow", "torch", "transformers")

Build = Callable[[Subject], Engine]


def build_engine(
    subject: Subject,
    *,
    end_tokens: Sequence[int] = (),
    resources: GenerateResources = GenerateResources(),  # noqa: B008 (frozen)
) -> Engine:
    """The engine that is measured; without end tokens, every answer is as long as it may be."""
    return engine_of(
        twin(subject.model), eos_token_ids=end_tokens, table=subject.table, resources=resources
    )


@dataclass(frozen=True)
class Bench:
    """What is measured. `random`: a name of `reference.SHAPES`, instead of the checkpoint."""

    mode: Mode
    images: int
    questions: int
    new_tokens: int
    model: str
    random: str | None = None
    dtype: str = "auto"
    batch_sizes: Sequence[int] = (8, 16, 32)
    rounds: int = 5
    checked: int = 16
    is_exact: bool = True
    threads: int | None = None
    seed: int = 0
    compile: bool = False

    @property
    def resources(self) -> GenerateResources:
        return GenerateResources(compile=self.compile)

    def subject(self) -> Subject:
        if self.random is not None:
            return random_subject(self.random, seed=self.seed, dtype=self.dtype)
        return load_subject(ModelSpec.model_validate({"path": self.model, "dtype": self.dtype}))

    def work(self, subject: Subject) -> Workload:
        images = noise(subject.image_shape, self.images, seed=self.seed)
        lengths = {"new_tokens": self.new_tokens, "seed": self.seed}
        if self.mode == "caption":
            return captions(subject.vocabulary, images, **lengths)
        return questions(subject.vocabulary, images, each=self.questions, **lengths)

    def kinds(self) -> Mapping[str, Sequence[Setting]]:
        """The ways of `generate` that are measured. Where answers differ in length, one of them is
        told the lengths beforehand."""
        kinds = {
            "generate": [Setting(n) for n in self.batch_sizes],
            "generate_static": [Setting(n, cache="static") for n in self.batch_sizes],
        }
        if self.mode == "caption":
            kinds["generate_sorted"] = [Setting(n, order="answer") for n in self.batch_sizes]
        return kinds


def measure(bench: Bench, *, say: Say, build: Build | None = None) -> dict[str, Any]:
    """Speed-ups, rates and agreement, as JSON. `build`: another engine than the one described.

    Raises SpecError, and JobError where an answer fails.
    """
    build = build or functools.partial(build_engine, resources=bench.resources)
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    subject = bench.subject()
    work = bench.work(subject)
    ran = ran_against(subject, compiled=bench.compile)
    baseline = Baseline(subject.model, work, subject.table)
    race = Race(build(subject), baseline, work, say)
    race.run(bench.kinds(), rounds=bench.rounds)
    figures = _figures(race, bench.kinds())
    rows = agreement.sample(len(work.rows), bench.checked)
    found = {}
    if subject.dtype != "float32":
        say(f"agreement in {subject.dtype}")
        found[subject.dtype] = _forced(race, rows)
    del race, baseline
    if bench.is_exact or subject.dtype == "float32":
        say("agreement in float32")
        found["float32"] = _exact(subject, work, rows, build)
    return {
        "benchmark": f"engine against transformers generate, {bench.mode}",
        **figures,
        "agreement": found,
        "ok": all(part["ok"] for part in found.values()),
        "work": _told(work),
        "ran": ran,
    }


def _figures(race: Race, kinds: Iterable[str]) -> dict[str, Any]:
    work = race.work
    images_per_unit = len(work.images) / work.units(work.rows)

    def rate(rates: Sequence[float]) -> dict[str, Any]:
        middle = median(rates)
        return {
            "median": round(middle, 3),
            "images_per_s": round(middle * images_per_unit, 3),
            "rounds": [round(rate, 3) for rate in rates],
        }

    best = {kind: race.lane(kind) for kind in kinds}
    speedups = {
        kind.replace("generate", "speedup"): round(race.speedup(lane), 3)
        for kind, lane in best.items()
    }
    rates = {
        kind: {"batch_size": b.setting.batch_size, **rate(b.rounds)} for kind, b in best.items()
    }
    trials: dict[str, dict[int, float]] = {kind: {} for kind in kinds}
    for lane in race.trials:
        trials[lane.kind][lane.setting.batch_size] = round(lane.trial, 3)
    return {
        **speedups,
        "unit": work.unit,
        "rates": {"engine": rate(race.rates), **rates},
        "trials": trials,
    }


def _forced(race: Race, rows: Sequence[int]) -> dict[str, Any]:
    """The engine's tokens, and for comparison those of `generate`'s batches."""
    work, baseline = race.work, race.baseline
    engine = tokens_of(work, race.engine.submit(work.requests(-1)))
    batched = baseline.answer(work.rows, race.lane("generate").setting)
    found = agreement.forced(baseline, work.rows, {i: engine[i] for i in rows})
    generate = agreement.forced(baseline, work.rows, {i: batched[i] for i in rows})
    return {
        "compared_with": "logits of forward on the single unpadded prompt, the tokens forced",
        "engine": found,
        "generate": generate,
        "ok": found["ok"],
    }


def _exact(subject: Subject, work: Workload, rows: Sequence[int], build: Build) -> dict[str, Any]:
    """In float32, whatever was measured in: the model is changed in place."""
    cast(subject.model, torch.float32)
    said = tokens_of(work, build(subject).submit(work.requests(-2)))
    baseline = Baseline(subject.model, work, subject.table)
    return agreement.exact(baseline, work.rows, {i: said[i] for i in rows})


def _told(work: Workload) -> dict[str, Any]:
    prompts = [len(row.token_ids) for row in work.rows]
    answers = [row.new_tokens for row in work.rows]
    return {
        "mode": work.mode,
        "images": len(work.images),
        "rows": len(work.rows),
        "prompt_tokens": {"mean": round(sum(prompts) / len(prompts), 2), "longest": max(prompts)},
        "new_tokens": {"mean": round(sum(answers) / len(answers), 2), "longest": max(answers)},
    }


def ran_against(subject: Subject, *, compiled: bool = False) -> dict[str, Any]:
    """What it ran against."""
    return ran_with(subject.name, subject.dtype, subject.model, compiled=compiled)


def ran_with(name: str, dtype: str, model: Any, *, compiled: bool = False) -> dict[str, Any]:
    return {
        "model": name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": dtype,
        "attention": model.config._attn_implementation,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "compile": compiled,
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in VERSIONS},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
