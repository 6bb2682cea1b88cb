"""Whole jobs over manifests: many lines on one image, which is read, decoded and looked at once."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from jobs.verify import verify
from schemas.job import JobSpec
from tests.counted import COUNTING, counted, decodes
from tests.web import Web
from tests.whole_jobs import REPOSITORY, answers, job_of, ray_of, run, scene

pytestmark = pytest.mark.slow

IMAGES = 24


def name_of(number: int) -> str:
    return f"COCO_val2014_{number:012}.jpg"


def asked_of(number: int) -> list[tuple[str, str]]:
    """Five questions about a scene, and the answers."""
    colour, shape, _ = scene(number)
    other = scene(number + 1)[0]
    return [
        ("what color is the shape?", colour),
        ("what shape is present?", shape),
        (f"is there a {colour} shape?", "yes"),
        (f"is there a {other} shape?", "no"),
        ("what shape is in the image?", shape),
    ]


def write_vqa(folder: Path) -> list[dict[str, Any]]:
    """Questions and annotations as VQA's, shuffled; gives the questions with their answers."""
    rows = [
        {"image_id": number, "question_id": 10 * number + n, "question": question, "answer": answer}
        for number in range(IMAGES)
        for n, (question, answer) in enumerate(asked_of(number))
    ]
    random.Random(0).shuffle(rows)
    questions = [{k: row[k] for k in ("image_id", "question", "question_id")} for row in rows]
    known = [
        {"question_id": row["question_id"], "image_id": row["image_id"], "best": row["answer"]}
        for row in sorted(rows, key=lambda row: row["question_id"])
    ]
    header = {"data_type": "mscoco", "data_subtype": "val2014"}
    for name, content in (("questions", questions), ("annotations", known)):
        file = folder / f"v2_mscoco_val2014_{name}.json"
        file.write_text(json.dumps({**header, name: content}))
    return rows


def vqa_job(folder: Path, web: Web) -> JobSpec:
    source = {
        "format": "manifest",
        "path": [
            f"{folder}/v2_mscoco_val2014_{name}.json" for name in ("questions", "annotations")
        ],
        "image_root": f"http://127.0.0.1:{web.server_address[1]}/val2014",
        "keep": ["best"],
    }
    # By its path: who asks the model by its name is warned after a look at some images.
    model = {"path": str(REPOSITORY / "pipeline/embedded/checkpoint"), "dtype": "float32"}
    ask = [{"from": "questions"}]
    return job_of(folder, folder / "out", source=source, ask=ask, model=model)


def test_five_shuffled_questions_an_image_cost_one_look_at_each(
    tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", COUNTING)
    monkeypatch.setattr("pipeline.sources.manifest.PIECE_BYTES", 4000)
    for number in range(IMAGES - 1):
        web.files[name_of(number)] = counted(scene(number)[2], log=tmp_path / f"{number}.log")
    rows = write_vqa(tmp_path)
    job = vqa_job(tmp_path, web).model_copy(update={"max_failed_fraction": 0.1})
    with ray_of(num_cpus=2):
        result, _ = run(job)
        assert result.record["counts"] == {"ok": 115, "failed": 5, "skipped": 0}
        assert dict(web.asked) == {name_of(number): 1 for number in range(IMAGES)}
        assert [decodes(tmp_path / f"{number}.log") for number in range(IMAGES)] == [1] * 23 + [0]
        run(job)
        assert sum(web.asked.values()) == IMAGES
    table = {row["source_index"]: row for row in answers(tmp_path / "out")}
    assert sorted(table) == list(range(5 * IMAGES))
    for index, row in table.items():
        asked = rows[index]
        assert row["question"] == asked["question"]
        assert row["question_id"] == str(asked["question_id"])
        assert row["sample_id"] == name_of(asked["image_id"])
        assert row["best"] == json.dumps(asked["answer"])
        if asked["image_id"] == IMAGES - 1:
            assert (row["error_stage"], row["error_class"]) == ("read", "ImageMissing")
        else:
            assert row["answer"] == asked["answer"]
    assert verify(job).ok
