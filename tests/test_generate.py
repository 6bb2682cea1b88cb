"""The accelerator step: prepared rows to answer rows."""

import datetime
import io

import pyarrow as pa
import pytest
import torch

from pipeline.encode import Encode
from pipeline.generate import Generate
from schemas.job import JobSpec
from schemas.tables import SAMPLE, answered_schema, table_of, with_keep
from tests.models import (
    hub_cache,
    noise_image,
    shared_checkpoint,
    tiny_model,
    tiny_processor,
    write_checkpoint,
)

KEEP = {"url": pa.string(), "at": pa.timestamp("ns")}
BIG = 1_700_000_000_123_456_789
UNITS = ["caption", "colour", "questions"]


def job_of(**parts):
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x"},
            "ask": [
                {"id": "caption", "prompt": "Describe the image."},
                {"id": "colour", "prompt": "Which colour?", "max_new_tokens": 5},
                {"from": "questions"},
            ],
            "model": {"path": str(shared_checkpoint())},
            "output": {"path": "y"},
            "generate": {"max_new_tokens": 8},
            **parts,
        }
    )


def png(seed):
    file = io.BytesIO()
    noise_image(seed).save(file, "png")
    return file.getvalue()


def sample(index, **columns):
    row = {
        "source_uri": "a.tar",
        "source_index": index,
        "shard_identity": "etag",
        "sample_id": f"s{index}",
        "units": UNITS,
        "image": png(index),
        "keep.url": f"http://{index}",
        "keep.at": BIG + index,
    }
    return {**row, **columns}


SAMPLES = [
    sample(0, questions=[{"id": "a", "question": "How many?"}, {"id": "b", "question": "Who?"}]),
    sample(1),
    {"source_uri": "a.tar", "shard_identity": "etag", "rows_total": 4},
    sample(2, image=b"broken"),
    sample(3, units=["colour"]),
]


@pytest.fixture(scope="module")
def prepared():
    return Encode(job_of(), KEEP)(table_of(SAMPLES, with_keep(SAMPLE, KEEP)))


@pytest.fixture(scope="module")
def table(prepared):
    return Generate(job_of(), KEEP, run_id="run-1", threads=1)(prepared)


@pytest.fixture(scope="module")
def answers(table):
    return table.to_pylist()


def test_every_prompt_is_one_row_in_input_order_and_end_marks_pass(table, answers):
    assert table.schema == answered_schema(KEEP)
    assert [(a["source_index"], a["question_id"], a["status"]) for a in answers] == [
        (0, "caption", "ok"),
        (0, "colour", "ok"),
        (0, "a", "ok"),
        (0, "b", "ok"),
        (1, "caption", "ok"),
        (1, "colour", "ok"),
        (1, None, "skipped"),
        (None, None, None),
        (2, "caption", "failed"),
        (2, "colour", "failed"),
        (2, None, "skipped"),
        (3, "colour", "ok"),
    ]
    end = answers[7]
    assert {k: v for k, v in end.items() if v is not None} == SAMPLES[2]


def test_answers_are_what_generate_says_alone(prepared, answers):
    processor, model = tiny_processor(), tiny_model()
    by_id = {(a["source_index"], a["question_id"]): a for a in answers}
    for row in prepared.to_pylist():
        for prompt in row["prompts"] or ():
            if prompt["status"] is not None:
                continue
            image = noise_image(row["source_index"])
            inputs = processor(text=prompt["prompt"], images=image, return_tensors="pt")
            longest = prompt["max_new_tokens"]
            whole = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            said = whole[0, inputs["input_ids"].shape[1] :]
            text = processor.tokenizer.decode(said, skip_special_tokens=True).strip()
            answer = by_id[row["source_index"], prompt["question_id"]]
            assert answer["answer"] == text
            assert answer["output_tokens"] == len(said)
            assert answer["prompt_tokens"] == inputs["input_ids"].shape[1]


def test_an_answer_carries_all_that_the_table_promises(answers):
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=10)
    first = answers[0]
    assert first["answered_at"] > before
    assert first["mean_logprob"] < 0
    assert first["finish_reason"] in ("stop", "length")
    assert len(first["image_sha256"]) == 64
    expected = {
        "source_uri": "a.tar",
        "sample_id": "s0",
        "turn": 0,
        "sample_number": 0,
        "question": "Describe the image.",
        "error_class": None,
        "attempts": 1,
        "choice_probs": None,
        "image_width": 40,
        "image_height": 32,
        "prompt": None,
        "model": str(shared_checkpoint()),
        "run_id": "run-1",
        "shard_identity": "etag",
        "rows_total": None,
        "units": UNITS,
        "row_answers": 4,
        "keep.url": "http://0",
    }
    assert {name: first[name] for name in expected} == expected


def test_a_failed_row_says_why_and_has_no_answer(answers):
    failed = answers[8]
    assert (failed["error_stage"], failed["error_class"]) == ("decode", "ImageUnidentified")
    assert failed["error_message"]
    assert failed["answer"] is None
    assert failed["finish_reason"] is None
    assert failed["row_answers"] == 3


def test_a_skipped_row_says_why(answers):
    assert (answers[6]["error_stage"], answers[6]["error_class"]) == ("prompt", "NoQuestions")


def test_kept_columns_go_with_each_answer_of_their_row(table):
    kept = table["keep.at"].cast(pa.int64()).to_pylist()
    indexes = table["source_index"].to_pylist()
    assert kept == [None if i is None else BIG + i for i in indexes]


def test_prompts_are_written_where_asked_for(prepared):
    job = job_of(output={"path": "y", "prompts": True})
    rows = Generate(job, KEEP, run_id="r")(prepared).to_pylist()
    assert rows[1]["prompt"] == "USER: <image>\nWhich colour? ASSISTANT:"


def test_the_model_column_names_the_revision(prepared, monkeypatch, tmp_path):
    with hub_cache(monkeypatch, tmp_path) as name:
        job = job_of(model={"path": name, "revision": "main"})
        rows = Generate(job, KEEP, run_id="r")(prepared).to_pylist()
    assert rows[0]["model"] == f"{name}@main"
    assert rows[0]["status"] == "ok"


def test_a_batch_with_nothing_to_answer_needs_no_model_run(prepared):
    generate = Generate(job_of(), KEEP, run_id="r")
    assert generate(prepared.slice(2, 1)).num_rows == 1
    assert generate(prepared.slice(0, 0)).num_rows == 0


def test_a_model_that_says_nothing_gives_an_empty_answer_that_stopped(tmp_path, prepared):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = 0
    folder = write_checkpoint(tmp_path, model=model)
    job = job_of(model={"path": str(folder)})
    first = Generate(job, KEEP, run_id="r")(prepared).to_pylist()[0]
    assert (first["answer"], first["status"], first["finish_reason"]) == ("", "ok", "stop")
    assert first["output_tokens"] == 1
    assert first["mean_logprob"] == pytest.approx(-torch.tensor(256.0).log().item())


def test_a_model_with_broken_weights_gives_failed_rows(tmp_path, prepared):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    job = job_of(model={"path": str(write_checkpoint(tmp_path, model=model))})
    rows = Generate(job, KEEP, run_id="r")(prepared).to_pylist()
    assert (rows[0]["status"], rows[0]["error_stage"]) == ("failed", "generate")
    assert rows[0]["error_class"] == "NonFiniteLogits"
    assert rows[0]["answer"] is None
    assert rows[0]["prompt_tokens"] > 0


def test_the_embedded_model_answers_its_samples(prepared):
    job = job_of(model={"path": "embedded"})
    samples = table_of([sample(0)], with_keep(SAMPLE, KEEP))
    rows = Generate(job, KEEP, run_id="r")(Encode(job, KEEP)(samples)).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped"]
