"""Is the embedded model less sure of itself where it cannot know the answer?

    python -m benchmarks.embedded_domain [--images N]

Asks the first N images of easy-VQA's test split their own questions and the 50 of
`unrelated_questions.txt`, through `lavaflow run`, and prints one JSON object: the mean of the
answers' `mean_logprob` for each of the two. Exits 1 where the unrelated mean is not the lower one.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.dataset as ds
import yaml

from benchmarks.easy_vqa import lavaflow, spec_of, write_shards
from tools.easy_vqa_data import LabelledImage, load_split

UNRELATED = Path(__file__).with_name("unrelated_questions.txt")
UNRELATED_ID = "unrelated-"


def measure(images: Sequence[LabelledImage], folder: Path) -> dict[str, Any]:
    shards, output, spec = folder / "shards", folder / "output", folder / "spec.yaml"
    prompts = [
        {"id": f"{UNRELATED_ID}{number:02d}", "prompt": question}
        for number, question in enumerate(UNRELATED.read_text().splitlines())
    ]
    write_shards(images, shards)
    spec.write_text(yaml.safe_dump(spec_of(shards, output, prompts=prompts)))
    run = lavaflow("run", str(spec), "--json")
    table = ds.dataset(output / "answers", format="parquet").to_table(
        columns=["question_id", "mean_logprob"]
    )
    logprobs: dict[bool, list[float]] = {True: [], False: []}
    for row in table.to_pylist():
        logprobs[row["question_id"].startswith(UNRELATED_ID)].append(row["mean_logprob"])
    return {
        "benchmark": "mean_logprob of unrelated questions against easy-VQA's own",
        "images": len(images),
        "unrelated_questions": len(prompts),
        "unrelated_answers": len(logprobs[True]),
        "unrelated_mean": fmean(logprobs[True]),
        "own_answers": len(logprobs[False]),
        "own_mean": fmean(logprobs[False]),
        "run_exit_status": run["exit_status"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    images = load_split("test")[: parser.parse_args().images]
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(images, Path(scratch))
    print(json.dumps(figures, indent=2))
    raise SystemExit(0 if figures["unrelated_mean"] < figures["own_mean"] else 1)


if __name__ == "__main__":
    main()
