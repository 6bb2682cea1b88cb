"""Decoding and encoding against transformers' own processor, and `fast` against `exact`.

    python -m benchmarks.preprocess [--rounds N] [--images N] [--only exact|fast|answers]

Three measurements, each printed as one JSON object:

    exact    JPEGs of 640 x 480 through `Encode`, and through transformers' processor
    fast     JPEGs of 12 megapixels through `Encode` with `source.decode` exact and with fast, and
             through the processor; how far the pixels of fast are from those of exact
    answers  easy-VQA's test images as large JPEGs through the embedded model, exact and fast

The processor is that of LLaVA-1.5 (CLIP, 336 pixels, 576 image tokens) with the embedded
tokenizer. The photos are made here: noise whose amplitude falls with the frequency, as it does in
photographs, at quality 90. Speed is images for each second of CPU time, the decoding process
included; what is compared takes turns, and a ratio is the median of the rounds' ratios. `exact`
must give the processor's pixels and token ids, bit for bit: it exits 1 where it does not. One
question is asked of all images, as in most jobs; the processor tokenises it every time. What is
named `pixels` leaves the question out, on both sides.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, features

from jobs import photos
from jobs.photos import jpeg
from pipeline.decoder import Decoded, Decoder, settings_of
from pipeline.embedded import CHECKPOINT
from pipeline.encode import Encode
from pipeline.engine.load import load_processor
from pipeline.engine.pixels import pixel_table, resize_of
from pipeline.generate import Generate
from schemas.job import JobSpec
from schemas.tables import SAMPLE, table_of
from tools.easy_vqa_data import LabelledImage, load_split

QUESTION = "What is in this picture?"
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"
SMALL, LARGE = (640, 480), (4000, 3000)
CONTEXT = 4096
ANSWERED_SIDES_PX = (320, 512, 1024, 2048)
"""From where fast halves an image for 64 pixels, over sizes that it takes closest, and beyond."""


def photo(size: tuple[int, int], *, seed: int) -> bytes:
    """A JPEG of the statistics of a photograph; of 12 megapixels, 0.3 bytes a pixel."""
    return jpeg(photos.photo(size, seed=seed))


@contextlib.contextmanager
def checkpoint_of_336_pixels() -> Iterator[Path]:
    """The embedded checkpoint's tokenizer with LLaVA-1.5's image processor; no weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for file in CHECKPOINT.glob("*"):
            if file.suffix in {".json", ".jinja"}:
                shutil.copy(file, path)
        with _edited(path / "processor_config.json") as processor:
            processor["patch_size"] = 14
            images = processor["image_processor"]
            images["size"] = {"shortest_edge": 336}
            images["crop_size"] = {"height": 336, "width": 336}
        with _edited(path / "config.json") as config:
            config["text_config"]["max_position_embeddings"] = CONTEXT
        yield path


@contextlib.contextmanager
def _edited(path: Path) -> Iterator[dict[str, Any]]:
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def job_of(model: Path | str, decode: str, ask: Sequence[dict[str, str]]) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x", "decode": decode},
            "ask": ask,
            "model": {"path": str(model)},
            "output": {"path": "y"},
        }
    )


def batch_of(images: Sequence[bytes], *, units: Sequence[str]) -> pa.Table:
    rows = [
        {"source_uri": "x", "image": image, "lines": [{"source_index": n, "units": list(units)}]}
        for n, image in enumerate(images)
    ]
    return table_of(rows, SAMPLE)


class Encoder:
    """`Encode`, with the CPU time of its decoding process."""

    def __init__(self, model: Path, decode: str) -> None:
        before = set(_children())
        self._encode = Encode(job_of(model, decode, [{"id": "q", "prompt": QUESTION}]), {})
        self(batch_of([photo((64, 64), seed=0)], units=["q"]))
        (self._child,) = set(_children()) - before

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._encode(batch)

    def cpu_s(self) -> float:
        return time.process_time() + _cpu_s_of(self._child)


class Pixels:
    """What `Encode` does to images alone."""

    def __init__(self, processor: Any, model: Path) -> None:
        before = set(_children())
        job = job_of(model, "exact", [{"from": "questions"}])
        self._decoder = Decoder(settings_of(job, resize_of(processor)))
        self([photo((64, 64), seed=0)])
        (self._child,) = set(_children()) - before

    def __call__(self, images: Sequence[bytes]) -> list[Decoded]:
        return [future.result() for future in [self._decoder.submit(image) for image in images]]

    def cpu_s(self) -> float:
        return time.process_time() + _cpu_s_of(self._child)


class Transformers:
    """The processor, or the half of it for images, one after the other, from the same bytes."""

    def __init__(self, processor: Any, *, text: str | None = PROMPT) -> None:
        self._processor = processor
        self._text = text

    def __call__(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        opened = (Image.open(io.BytesIO(image)).convert("RGB") for image in images)
        if self._text is None:
            return [self._processor.image_processor(images=image) for image in opened]
        return [self._processor(text=self._text, images=image) for image in opened]

    def cpu_s(self) -> float:
        return time.process_time()


def _children() -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(stat.parent.name)


def _cpu_s_of(pid: int) -> float:
    """Of another process, by the clock that clock_getcpuclockid(3) names."""
    return time.clock_gettime((~pid << 3) | 2)


Competitor = Encoder | Pixels | Transformers


def compared(
    competitors: dict[str, tuple[Competitor, Any]], *, rounds: int, images: int
) -> dict[str, Any]:
    """Each does its work in turn. Every ratio is how many times as fast the first name is."""
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, (what, work) in competitors.items():
            start = what.cpu_s()
            what(work)
            times[name].append(what.cpu_s() - start)
    pairs = itertools.combinations(reversed(competitors), 2)
    return {
        "images_per_cpu_s": {name: round(images / median(t), 1) for name, t in times.items()},
        "times_as_fast": {
            f"{one} / {other}": _median_ratio(times[other], times[one]) for one, other in pairs
        },
        "rounds": rounds,
    }


def _median_ratio(times: Sequence[float], over: Sequence[float]) -> float:
    return round(median(a / b for a, b in zip(times, over, strict=True)), 2)


def is_equal(encoded: pa.Table, processed: Sequence[dict[str, Any]], table: np.ndarray) -> bool:
    """Whether rows hold what the processor gives: pixels through the table, and token ids."""
    channel = np.arange(3)[:, None, None]
    for row, inputs in zip(encoded.to_pylist(), processed, strict=True):
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixels_shape"])
        ((prompt,),) = (line["prompts"] for line in row["lines"])
        values = table[channel, np.moveaxis(pixels, -1, 0)]
        expected = np.asarray(inputs["pixel_values"][0])
        if not np.array_equal(values, expected) or prompt["token_ids"] != inputs["input_ids"][0]:
            return False
    return True


def measure_exact(*, rounds: int, count: int) -> dict[str, Any]:
    images = [photo(SMALL, seed=seed) for seed in range(count)]
    batch = batch_of(images, units=["q"])
    with checkpoint_of_336_pixels() as model:
        processor = processor_of(model)
        theirs, ours = Transformers(processor), Encoder(model, "exact")
        equal = is_equal(ours(batch), theirs(images), pixel_table(processor))
        speed = compared(
            {"transformers": (theirs, images), "exact": (ours, batch)},
            rounds=rounds,
            images=count,
        )
        pixels = compared(
            {
                "transformers": (Transformers(processor, text=None), images),
                "exact": (Pixels(processor, model), images),
            },
            rounds=rounds,
            images=count,
        )
    name = "exact against transformers' processor"
    return {"benchmark": name, "equal": equal, **speed, "pixels": pixels}


def measure_fast(*, rounds: int, count: int) -> dict[str, Any]:
    images = [photo(LARGE, seed=seed) for seed in range(count)]
    batch = batch_of(images, units=["q"])
    with checkpoint_of_336_pixels() as model:
        exact, fast = Encoder(model, "exact"), Encoder(model, "fast")
        competitors: dict[str, tuple[Competitor, Any]] = {
            "transformers": (Transformers(processor_of(model)), images),
            "exact": (exact, batch),
            "fast": (fast, batch),
        }
        speed = compared(competitors, rounds=rounds, images=count)
        difference = difference_of(exact(batch), fast(batch))
    return {
        "benchmark": "fast against exact",
        "bytes_per_pixel": [round(len(i) / (LARGE[0] * LARGE[1]), 3) for i in images],
        **speed,
        "pixels": difference,
    }


def processor_of(model: Path) -> Any:
    return load_processor(job_of(model, "exact", [{"from": "questions"}]).model)


def difference_of(exact: pa.Table, fast: pa.Table) -> dict[str, float]:
    """Of channel values from 0 to 255."""
    pairs = zip(exact["pixels"].to_pylist(), fast["pixels"].to_pylist(), strict=True)
    arrays = [[np.frombuffer(pixels, np.uint8).astype(int) for pixels in pair] for pair in pairs]
    off = np.concatenate([np.abs(a - b) for a, b in arrays])
    psnr = 10 * np.log10(255**2 / (off**2).mean())
    return {
        "mean_difference": round(float(off.mean()), 2),
        "largest_difference": int(off.max()),
        "psnr_db": round(float(psnr), 1),
    }


def measure_answers(*, count: int) -> dict[str, Any]:
    """How many answers fast changes, and how many of each are right."""
    labelled = load_split("test")[:count]
    asks = sorted({question for image in labelled for question, _ in image.questions})
    ids = {question: f"q{n}" for n, question in enumerate(asks)}
    spec = [{"id": id, "prompt": question} for question, id in ids.items()]
    encoders = {mode: Encode(job_of("embedded", mode, spec), {}) for mode in ("exact", "fast")}
    generate = Generate(job_of("embedded", "exact", spec), {}, run_id="bench", threads=1)
    right = dict.fromkeys(encoders, 0)
    asked = changed = 0
    psnr: list[float] = []
    for number, image in enumerate(labelled):
        expected = {ids[question]: answer for question, answer in image.questions}
        batch = batch_of([enlarged(image, number)], units=list(expected))
        prepared = {mode: encode(batch) for mode, encode in encoders.items()}
        psnr.append(difference_of(prepared["exact"], prepared["fast"])["psnr_db"])
        answers = {mode: answers_of(generate(rows)) for mode, rows in prepared.items()}
        asked += len(expected)
        changed += sum(answers["exact"][id] != answers["fast"][id] for id in expected)
        for mode, given in answers.items():
            right[mode] += sum(given[id] == answer for id, answer in expected.items())
    return {
        "benchmark": "answers of the embedded model, fast against exact",
        "images": count,
        "sides_px": ANSWERED_SIDES_PX,
        "questions": asked,
        "changed": changed,
        "right": right,
        "least_psnr_db": min(psnr),
    }


def enlarged(image: LabelledImage, number: int) -> bytes:
    side = ANSWERED_SIDES_PX[number % len(ANSWERED_SIDES_PX)]
    with Image.open(image.path) as opened:
        small = opened.convert("RGB")
    return jpeg(small.resize((side, side), Image.Resampling.BICUBIC))


def answers_of(rows: pa.Table) -> dict[str, str]:
    return dict(zip(rows["question_id"].to_pylist(), rows["answer"].to_pylist(), strict=True))


def versions() -> dict[str, str | None]:
    names = ("pillow", "transformers", "numpy", "torch")
    turbo = features.version("libjpeg_turbo")
    return {**{name: version(name) for name in names}, "libjpeg-turbo": turbo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=48, help="of the measurement `exact`")
    parser.add_argument("--only", choices=("exact", "fast", "answers"), default=None)
    arguments = parser.parse_args()
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "exact": lambda: measure_exact(rounds=arguments.rounds, count=arguments.images),
        "fast": lambda: measure_fast(rounds=arguments.rounds, count=4),
        "answers": lambda: measure_answers(count=200),
    }
    is_good = True
    for name in [arguments.only] if arguments.only else measures:
        figures = {**measures[name](), "load_average": os.getloadavg()[0], "versions": versions()}
        is_good &= figures.get("equal", True)
        print(json.dumps(figures, indent=2), flush=True)
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
