"""Accuracy of the embedded model on easy-VQA's test split, through the whole pipeline.

    python -m benchmarks.easy_vqa [--disturb none|jpeg-80|...] [--images N] [--keep-folder DIR]

Packs the split (PyPI `easy-vqa`: 1,000 images, 9,673 questions) into tar shards, its images as they
are or disturbed (`tools.measure_embedded`), answers every question and one caption an image with
`lavaflow run`, checks the table with `lavaflow verify`, and prints one JSON object: rates by
kind of question and size of shape, what was taken for what, statuses, and what it ran against.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import yaml
from PIL import Image

from tools.easy_vqa_data import LabelledImage, load_split
from tools.measure_embedded import DISTURBANCES, size_class
from tools.questions import kind_of

IMAGES_PER_SHARD = 100
CAPTION = {"id": "caption", "prompt": "Describe the image."}
AS_THEY_ARE = "none"


def write_shards(
    images: Sequence[LabelledImage],
    folder: Path,
    *,
    disturb: Callable[[Image.Image], Image.Image] = DISTURBANCES[AS_THEY_ARE],
) -> None:
    """Tar shards in the webdataset layout: `KEY.png` and `KEY.json` with the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), IMAGES_PER_SHARD):
        path = folder / f"easy-vqa-{start // IMAGES_PER_SHARD:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for image in images[start : start + IMAGES_PER_SHARD]:
                questions = [
                    {"id": f"q{n}", "question": question}
                    for n, (question, _) in enumerate(image.questions)
                ]
                _add(tar, f"{image.image_id:06d}.png", png_of(image.path, disturb))
                _add(tar, f"{image.image_id:06d}.json", json.dumps({"questions": questions}))


def png_of(path: Path, disturb: Callable[[Image.Image], Image.Image]) -> bytes:
    """The file of the disturbed image; PNG keeps what JPEG left of it."""
    buffer = io.BytesIO()
    disturb(opened(path)).save(buffer, format="PNG")
    return buffer.getvalue()


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _add(tar: tarfile.TarFile, name: str, data: bytes | str) -> None:
    raw = data.encode() if isinstance(data, str) else data
    member = tarfile.TarInfo(name)
    member.size = len(raw)
    tar.addfile(member, io.BytesIO(raw))


def spec_of(shards: Path, output: Path, *, prompts: Sequence[dict[str, str]]) -> dict[str, Any]:
    """A job that asks these prompts of every image, and each image's own questions."""
    return {
        "name": "easy-vqa-test",
        "source": {"format": "webdataset", "path": str(shards)},
        "ask": [*prompts, {"from": "questions"}],
        "output": {"path": str(output)},
    }


def lavaflow(*arguments: str) -> dict[str, Any]:
    """Run a command that prints JSON; its exit status is part of the result."""
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return {"exit_status": done.returncode, **json.loads(done.stdout)}


def score(images: Sequence[LabelledImage], output: Path) -> dict[str, Any]:
    """Exact answers by question kind, and captions that name the colour and the shape."""
    by_key = {f"{image.image_id:06d}": image for image in images}
    sizes = {key: size_class(opened(image.path)) for key, image in by_key.items()}
    asked, right = Counter[str](), Counter[str]()
    status = Counter[str]()
    confusions = {kind: defaultdict(Counter[str]) for kind in ("colour", "shape")}
    table = ds.dataset(output / "answers", format="parquet").to_table()
    for row in table.to_pylist():
        status[row["status"]] += 1
        image = by_key[row["sample_id"]]
        answer = row["answer"] or ""
        words = set(answer.split())
        if row["question_id"] == CAPTION["id"]:
            whole = kind = "captions"
            is_right = bool(image.colours & words) and bool(image.shapes & words)
        else:
            question, expected = image.questions[int(row["question_id"][1:])]
            whole, kind = "questions", kind_of(question)
            is_right = answer == expected
            if kind in confusions:
                confusions[kind][expected][answer] += 1
        for name in {whole, kind, f"{whole}, shape {sizes[row['sample_id']]}"}:
            asked[name] += 1
            right[name] += is_right
    return {
        "rows": table.num_rows,
        "status": dict(status),
        "right": {name: right[name] / asked[name] for name in sorted(asked)},
        "right_of_asked": {name: [right[name], asked[name]] for name in sorted(asked)},
        "confusions": confusions,
    }


def measure(images: Sequence[LabelledImage], folder: Path, *, disturbance: str) -> dict[str, Any]:
    shards, output, spec = folder / "shards", folder / "output", folder / "spec.yaml"
    write_shards(images, shards, disturb=DISTURBANCES[disturbance])
    spec.write_text(yaml.safe_dump(spec_of(shards, output, prompts=[CAPTION])))
    start = time.perf_counter()
    run = lavaflow("run", str(spec), "--json")
    wall_s = time.perf_counter() - start
    verified = lavaflow("verify", str(output))
    return {
        "benchmark": "easy-VQA test split through lavaflow run",
        "disturbance": disturbance,
        **score(images, output),
        "run_exit_status": run["exit_status"],
        "verify_exit_status": verified["exit_status"],
        "wall_s": round(wall_s, 1),
        "versions": {name: version(name) for name in ("easy-vqa", "ray", "torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disturb", choices=tuple(DISTURBANCES), default=AS_THEY_ARE)
    parser.add_argument("--images", type=int, default=None, help="only the first N images")
    parser.add_argument("--keep-folder", type=Path, default=None, help="keep shards and table here")
    arguments = parser.parse_args()
    images = load_split("test")[: arguments.images]
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(
            images, arguments.keep_folder or Path(scratch), disturbance=arguments.disturb
        )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
