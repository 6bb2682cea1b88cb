"""What weights of 8 and 4 bits save, cost, and do to answers, beside bfloat16.

    python -m benchmarks.quantization [--images N] [--rounds N] [--vqa-images N]

Needs `pip install 'lavaflow[quantization]'`. Two measurements, printed as one JSON object:

    cost      a reference model of random weights (ViT-S-135M, as in `lavaflow bench`), loaded from
              disk in a process of its own for each kind of weights: what the weights take, how much
              the process grows by loading them and answering, and the engine's rates
    answers   easy-VQA's test questions put to the embedded model: how many answers are right, and
              how many are those of bfloat16

`weights_bytes` are those of parameters, buffers, and the scales of what is quantized. How the
process grows is told without libraries: at most, and when all is answered. A rate by CPU time says
more than one by the clock where others work on the machine.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.exactness import WIDE_BYTES, Bench
from jobs.bench import ran_against
from jobs.race import tokens_of
from jobs.subject import Subject, load_subject, save_random
from jobs.workload import Workload, captions, noise, questions
from pipeline.engine.choose import engine_of
from pipeline.engine.load import load_model
from pipeline.engine.memory import weights_bytes
from pipeline.engine.quantization import PACKAGES
from schemas.job import ModelSpec
from tools.easy_vqa_data import LabelledImage, load_split

KINDS = ("none", "8bit", "4bit")
RANDOM = "ViT-S-135M"
QUESTIONS_EACH, CAPTION_TOKENS = 10, 30


def spec_of(path: str, quantization: str) -> ModelSpec:
    return ModelSpec.model_validate(
        {"path": path, "dtype": "bfloat16", "quantization": quantization, "device": "cpu"}
    )


def cost(checkpoint: Path, *, images: int, rounds: int) -> dict[str, Any]:
    """Each kind of weights in a process of its own."""
    found = {}
    for kind in KINDS:
        print(f"cost of {kind}", file=sys.stderr)
        arguments = ["--one", kind, str(checkpoint), "--images", images, "--rounds", rounds]
        command = [sys.executable, "-m", "benchmarks.quantization", *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[kind] = json.loads(done.stdout)
    return found


def one(kind: str, checkpoint: str, *, images: int, rounds: int) -> dict[str, Any]:
    spec = spec_of(checkpoint, kind)
    # Libraries are no part of what is compared.
    load_model(ModelSpec(quantization=spec.quantization), torch.device("cpu"))
    before = resident_bytes()
    subject = load_subject(spec)
    pictures = noise(subject.image_shape, images, seed=0)
    lengths = {"new_tokens": 3, "seed": 0}
    vqa = questions(subject.vocabulary, pictures, each=QUESTIONS_EACH, **lengths)
    caption = captions(subject.vocabulary, pictures, new_tokens=CAPTION_TOKENS, seed=0)
    rates = rates_of(subject, [vqa, caption], rounds=rounds)
    grown = {"at_most": peak_bytes() - before, "at_rest": resident_bytes() - before}
    return {
        "weights_bytes": weights_bytes(subject.model),
        "process_grows_bytes": grown,
        "questions": rates[0],
        "caption_tokens": rates[1],
    }


def rates_of(subject: Subject, works: Sequence[Workload], *, rounds: int) -> list[dict[str, float]]:
    """The median of the rounds, after one that warms up."""
    engine = engine_of(subject.model, eos_token_ids=[], table=subject.table)
    measured: list[list[tuple[float, float]]] = [[] for _ in works]
    for n in range(rounds + 1):
        for work, rates in zip(works, measured, strict=True):
            start, start_cpu = time.perf_counter(), time.process_time()
            answered = engine.submit(work.requests(n))
            spent = time.perf_counter() - start, time.process_time() - start_cpu
            tokens_of(work, answered)
            rates.append((work.units(work.rows) / spent[0], work.units(work.rows) / spent[1]))
    return [
        {
            name: round(median(rate[n] for rate in rates[1:]), 2)
            for n, name in enumerate(("a_second", "a_cpu_second"))
        }
        for rates in measured
    ]


def resident_bytes() -> int:
    """Without what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answers(images: Sequence[LabelledImage]) -> dict[str, Any]:
    expected = [answer for image in images for _, answer in image.questions]
    said: dict[str, list[str]] = {}
    for kind in KINDS:
        bench = Bench(spec_of("embedded", kind))
        tokens = bench.engine(images, budget=WIDE_BYTES)
        decode = bench.processor.tokenizer.decode
        said[kind] = [decode(list(ids), skip_special_tokens=True).strip() for ids in tokens]
    return {
        kind: {
            "questions": len(expected),
            "right": sum(map(str.__eq__, texts, expected)),
            "as_bfloat16": sum(map(str.__eq__, texts, said["none"])),
        }
        for kind, texts in said.items()
    }


def measure(*, images: int, rounds: int, vqa_images: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), RANDOM, seed=0, dtype="bfloat16")
        ran = ran_against(load_subject(spec_of(folder, "none")))
        cost_of_each = cost(Path(folder), images=images, rounds=rounds)
    return {
        "benchmark": "weights of 8 and 4 bits against bfloat16, on the CPU",
        "cost": cost_of_each,
        "answers": answers(load_split("test")[:vqa_images]),
        "ran": ran,
        "versions": {name: version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="of the reference model's work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vqa-images", type=int, default=100, help="of easy-VQA's test split")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "CHECKPOINT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = {"images": given.images, "rounds": given.rounds}
    if given.one:
        print(json.dumps(one(*given.one, **sizes)))
    else:
        print(json.dumps(measure(**sizes, vqa_images=given.vqa_images), indent=2))


if __name__ == "__main__":
    main()
