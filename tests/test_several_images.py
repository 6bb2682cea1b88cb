"""Several images in one prompt: from the row to the answer, against the model's own processor and
`generate`, which are given all of them."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.plan import plan
from pipeline.encode import Encode
from pipeline.engine.load import load_model, load_processor
from pipeline.fingerprint import digest, model_fingerprint
from pipeline.generate import Generate
from pipeline.prompt import SEVERAL_IMAGES
from pipeline.read import ShardCoverage, ShardWork
from pipeline.sources import open_source
from schemas.errors import SpecError
from schemas.job import ColumnsSpec, JobSpec, ModelSpec, SourceSpec
from tests.families import saved_kind, saved_slow
from tests.lines import sample_table, tables_read, unfolded
from tests.models import SIDE, noise_image, shared_checkpoint
from tests.shards import json_bytes, saved, write_shard
from tests.test_engine_repair import edit

SIZES = [(40, 32), (100, 31), (31, 90), (64, 64)]
IMAGES = [noise_image(n, width=w, height=h) for n, (w, h) in enumerate(SIZES)]
PNGS = [saved(image, "PNG") for image in IMAGES]
ASK = [{"id": "red", "prompt": "Which is red?"}, {"id": "many", "prompt": "How many are there?"}]
WHO = [{"id": "who", "turns": ["Which is red?", "And blue?"]}]
FOLDERS = {
    "LLaVA": shared_checkpoint,
    "LLaVA-NeXT": lambda: saved_kind("LLaVA-NeXT, CLIP, Mistral"),
    "LLaVA-OneVision": lambda: saved_kind("LLaVA-OneVision, SigLIP, Qwen2"),
}


def job_of(folder: Path, ask: Sequence[Mapping[str, Any]] = ASK) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "parquet", "path": "x"},
            "ask": ask,
            "model": {"path": str(folder), "device": "cpu"},
            "output": {"path": "y", "prompts": True},
            "generate": {"max_new_tokens": 6},
        }
    )


def row_of(index: int, images: Sequence[bytes], job: JobSpec, **columns: Any) -> dict[str, Any]:
    first, *more = images
    return {
        "source_uri": "a.parquet",
        "source_index": index,
        "shard_identity": "etag",
        "sample_id": f"s{index}",
        "units": job.units,
        "image": first,
        "more_images": more or None,
        **columns,
    }


def answered(job: JobSpec, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As a job answers them."""
    prepared = Encode(job, {})(sample_table(rows))
    answers: list[dict[str, Any]] = Generate(job, {}, run_id="r", threads=1)(prepared).to_pylist()
    return answers


class Alone:
    """A checkpoint that is asked through transformers."""

    def __init__(self, folder: Path) -> None:
        spec = ModelSpec(path=str(folder), device="cpu")
        self.processor: Any = load_processor(spec)
        self.model: Any = load_model(spec, torch.device("cpu"))

    def check(self, answer: Mapping[str, Any], images: Sequence[Image.Image]) -> None:
        assert answer["status"] == "ok", answer["error_message"]
        assert answer["prompt"].count("<image>") == len(images)
        # As `apply_chat_template` hands them over: a list for each prompt.
        inputs = self.processor(text=[answer["prompt"]], images=[list(images)], return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        tokens = self.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        said = self.processor.tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
        assert (answer["prompt_tokens"], answer["answer"]) == (start, said.strip())


MIXED = [[0, 1], [2], [1, 0], [3, 3], [0, 1], [2, 0, 1]]
"""Which images each row has."""


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_with_one_image_and_several_are_answered_as_generate_answers_each_alone(
    name: str,
) -> None:
    job, alone = job_of(FOLDERS[name]()), Alone(FOLDERS[name]())
    rows = [row_of(n, [PNGS[i] for i in which], job) for n, which in enumerate(MIXED)]
    answers = answered(job, rows)
    assert [a["source_index"] for a in answers] == [n for n in range(len(MIXED)) for _ in ASK]
    for answer in answers:
        alone.check(answer, [IMAGES[i] for i in MIXED[answer["source_index"]]])
    said = [answer["answer"] for answer in answers]
    assert said[0:2] == said[8:10]
    assert said[0:2] != said[4:6]


@pytest.mark.parametrize("name", FOLDERS)
def test_later_turns_see_all_images(name: str) -> None:
    job, alone = job_of(FOLDERS[name](), WHO), Alone(FOLDERS[name]())
    answers = answered(job, [row_of(n, [PNGS[i] for i in w], job) for n, w in enumerate(MIXED)])
    assert [a["turn"] for a in answers] == [0, 1] * len(MIXED)
    for answer in answers:
        alone.check(answer, [IMAGES[i] for i in MIXED[answer["source_index"]]])


def test_an_answer_names_the_first_image() -> None:
    job = job_of(shared_checkpoint())
    several, one = answered(
        job_of(shared_checkpoint(), ASK[:1]),
        [row_of(0, PNGS[1:3], job, units=["red"]), row_of(1, PNGS[1:2], job, units=["red"])],
    )
    names = ("image_sha256", "image_width", "image_height")
    assert [several[name] for name in names] == [one[name] for name in names]
    assert several["image_width"] == SIZES[1][0]


def test_a_broken_image_fails_its_row_and_no_other() -> None:
    job, alone = job_of(shared_checkpoint()), Alone(shared_checkpoint())
    broken = [[PNGS[0], PNGS[1][:60]], [b"no image", PNGS[0]], [PNGS[0], PNGS[1], b""]]
    images = [[PNGS[0], PNGS[1]], *broken, [PNGS[2]]]
    answers = answered(job, [row_of(n, each, job) for n, each in enumerate(images)])
    for answer in answers[:2]:
        alone.check(answer, IMAGES[:2])
    for answer in answers[-2:]:
        alone.check(answer, [IMAGES[2]])
    failed = [(a["error_class"], a["error_message"].split(":")[0]) for a in answers[2:-2:2]]
    assert failed == [
        ("ImageCorrupt", "image 2 of 2"),
        ("ImageUnidentified", "image 1 of 2"),
        ("ImageEmpty", "image 3 of 3"),
    ]
    assert all(answer["status"] == "failed" for answer in answers[2:-2])


def test_image_marks_of_an_earlier_turn_are_dropped_one_for_each_image() -> None:
    job, alone = job_of(shared_checkpoint(), ASK[:1]), Alone(shared_checkpoint())
    talk = [
        {"role": "user", "content": "<image>\n<image>\nWho?"},
        {"role": "assistant", "content": "A cat."},
    ]
    rows = [row_of(n, PNGS[: 2 - n], job, conversation=talk) for n in range(2)]
    both, one = answered(job, rows)
    alone.check(both, IMAGES[:2])
    assert (one["status"], one["error_class"]) == ("failed", "ImageTokenInText")


def test_choices_are_given_behind_all_images() -> None:
    ask = [{"id": "which", "prompt": "Which?", "choices": ["red", "blue"]}]
    job = job_of(shared_checkpoint(), ask)
    orders = [[0, 1], [1, 0]]
    answers = answered(job, [row_of(n, [PNGS[i] for i in o], job) for n, o in enumerate(orders)])
    one, other = ([c["prob"] for c in answer["choice_probs"]] for answer in answers)
    assert one != other
    assert answers[0]["prompt_tokens"] == answers[1]["prompt_tokens"]


def test_a_model_of_the_slow_path_fails_rows_with_several() -> None:
    job = job_of(saved_slow("Gemma3"))
    several, one = unfolded(
        Encode(job, {})(sample_table([row_of(0, PNGS[:2], job), row_of(1, PNGS[:1], job)]))
    )
    assert {p["error"]["class"] for p in several["prompts"]} == {"ProcessorRefused"}
    assert "2 images" in several["prompts"][0]["error"]["message"]
    assert {p["status"] for p in one["prompts"]} == {None}


def tar_of(folder: Path) -> dict[str, Any]:
    members = [(f"{n}.{side}.png", PNGS[i]) for n, p in enumerate(PAIRS) for side, i in p.items()]
    write_shard(folder / "a.tar", members)
    return {"format": "webdataset", "columns": {"image": ["left.png", "right.png"]}}


def table_of_columns(folder: Path) -> dict[str, Any]:
    columns = {side: [PNGS[p[side]] if side in p else None for p in PAIRS] for side in SIDES}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return {"format": "parquet", "columns": {"image": [*SIDES]}}


def table_of_lists(folder: Path) -> dict[str, Any]:
    lists = [[PNGS[p[side]] for side in SIDES if side in p] for p in PAIRS]
    pq.write_table(pa.table({"images": lists}), folder / "a.parquet")
    return {"format": "parquet"}


def lines_of_lists(folder: Path) -> dict[str, Any]:
    for number, image in enumerate(PNGS):
        (folder / f"{number}.png").write_bytes(image)
    rows = [{"images": [f"{p[side]}.png" for side in SIDES if side in p]} for p in PAIRS]
    (folder / "a.jsonl").write_bytes(b"\n".join(map(json_bytes, rows)))
    return {"format": "manifest"}


SIDES = ("left", "right")
PAIRS = [{"left": 0, "right": 1}, {"left": 1, "right": 0}, {"left": 2}, {"left": 2, "right": 2}]


@pytest.mark.parametrize("write", [tar_of, table_of_columns, table_of_lists, lines_of_lists])
def test_from_the_source_to_the_answer(write: Any, tmp_path: Path) -> None:
    asked = job_of(shared_checkpoint())
    source = {**write(tmp_path), "path": str(tmp_path)}
    job = asked.model_copy(update={"source": SourceSpec.model_validate(source)})
    shards = open_source(job.source).list()
    tables = tables_read(job, [ShardWork(s, ShardCoverage(s.uri, s.identity)) for s in shards])
    encode, generate = Encode(job, {}), Generate(job, {}, run_id="r", threads=1)
    answers = [a for table in tables for a in generate(encode(table)).to_pylist() if a["status"]]
    alone = Alone(shared_checkpoint())
    is_list = write in (table_of_lists, lines_of_lists)
    for answer in sorted(answers, key=lambda answer: answer["source_index"]):
        pair = PAIRS[answer["source_index"]]
        if is_list or len(pair) == 2:
            alone.check(answer, [IMAGES[pair[side]] for side in SIDES if side in pair])
        else:
            assert (answer["status"], answer["error_class"]) == ("failed", "ImageMissing")
            assert "image 2 of 2" in answer["error_message"]
            assert "right" in answer["error_message"]
    by_index = Counter(answer["source_index"] for answer in answers)
    # What a tar lacks is one failed row, whatever is asked.
    assert by_index == {n: 1 if (n, write) == (2, tar_of) else 2 for n in range(len(PAIRS))}


def test_several_images_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(shared_checkpoint())
    encode = Encode(job, {})
    with caplog.at_level(logging.WARNING, logger="pipeline.encode"):
        for images in (PNGS[:1], PNGS[:2], PNGS[:2]):
            encode(sample_table([row_of(0, images, job)]))
    [warning] = [record.getMessage() for record in caplog.records]
    assert SEVERAL_IMAGES in warning


def pairs_of(tmp_path: Path, folder: Path) -> JobSpec:
    source = SourceSpec.model_validate({**tar_of(tmp_path), "path": str(tmp_path)})
    return job_of(folder).model_copy(update={"source": source})


def test_several_columns_are_warned_of_before_the_run_and_not_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = pairs_of(tmp_path, shared_checkpoint())
    [note] = plan(job).notes
    assert note == f"each prompt has 2 images: {SEVERAL_IMAGES}"
    Encode(job, {})(sample_table([row_of(0, PNGS[:2], job)]))
    assert not caplog.records


def test_nobody_is_warned_of_a_model_that_was_trained_on_several(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FOLDERS["LLaVA-OneVision"]()
    assert not plan(pairs_of(tmp_path, folder)).notes
    job = job_of(folder)
    Encode(job, {})(sample_table([row_of(0, PNGS[:2], job)]))
    assert not caplog.records


def test_a_processor_that_resizes_several_otherwise_fails_their_rows_alone(
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(FOLDERS["LLaVA-OneVision"](), tmp_path / "checkpoint")
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    crop = {"height": SIDE // 2, "width": SIDE // 2}
    settings |= {"do_center_crop": True, "crop_size": crop}
    edit(folder / "processor_config.json", image_processor=settings)
    job = job_of(folder)
    rows = [row_of(0, PNGS[:2], job), row_of(1, PNGS[:1], job)]
    several, one = unfolded(Encode(job, {})(sample_table(rows)))
    assert {p["error"]["class"] for p in several["prompts"]} == {"ProcessorRefused"}
    assert "in a way of its own" in several["prompts"][0]["error"]["message"]
    assert {p["status"] for p in one["prompts"]} == {None}


def test_several_columns_are_refused_for_a_model_of_the_slow_path(tmp_path: Path) -> None:
    job = pairs_of(tmp_path, saved_slow("Gemma3"))
    with pytest.raises(SpecError, match="puts 2 images in each prompt, and prompts of a Gemma3"):
        plan(job)


def test_one_name_in_a_list_is_the_same_column(tmp_path: Path) -> None:
    names: list[Any] = ["jpg", ["jpg"], ["jpg", "png"], ["png", "jpg"]]
    job = pairs_of(tmp_path, shared_checkpoint())
    columns = [ColumnsSpec.model_validate({"image": name}) for name in names]
    sources = [job.source.model_copy(update={"columns": each}) for each in columns]
    prints = [model_fingerprint(job.model_copy(update={"source": s}))["image"] for s in sources]
    assert prints[0] == prints[1] == digest({"column": "jpg"})
    assert len({*prints}) == 3
