"""Faults of LLaVA that others have reported, each held by a test: through the whole of what encodes
and answers rows, or through both engines.

Right padding, pad = eos, truncation, several images in a prompt of a mixed batch, system
prompts and images, 575 image tokens against 576 features.
"""

import functools
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.encode import Encode
from pipeline.engine.load import load_model, load_processor
from pipeline.engine.pixels import resized
from pipeline.engine.request import Branch, ImagePixels, Prefix, Request
from pipeline.generate import Generate
from schemas.job import JobSpec, ModelSpec
from schemas.tables import PREPARED, table_of
from tests.engine_cases import EOS, alone, cases_of, check, engine_for, request_of
from tests.lines import sample_table, unfolded
from tests.models import (
    SIDE,
    noise_image,
    questions,
    shared_checkpoint,
    tiny_model,
    tiny_processor,
)
from tests.test_engine_repair import edit

CPU = torch.device("cpu")
PLACES = 16
"""Of an image in a prompt."""
ENGINES = ["slots", "plain"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(shared_checkpoint(), tmp_path / "checkpoint")


@functools.cache
def whole() -> tuple[Any, Any]:
    """A processor and a model with which nothing is wrong; nobody changes them."""
    return tiny_processor(), tiny_model()


def loaded(folder: Path) -> tuple[Any, Any]:
    spec = ModelSpec(path=str(folder), device="cpu")
    return load_model(spec, CPU), load_processor(spec)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def job_of(folder: Path, **model: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x"},
            "ask": [{"from": "questions"}],
            "model": {"path": str(folder), "device": "cpu", **model},
            "output": {"path": "y", "prompts": True},
            "generate": {"max_new_tokens": 8},
        }
    )


def rows_of(asked: Sequence[Sequence[str]], **columns: Any) -> list[dict[str, Any]]:
    """A row for each list of questions, each with an image of its own."""
    return [
        {
            "source_uri": "a.tar",
            "source_index": index,
            "shard_identity": "etag",
            "sample_id": f"s{index}",
            "units": ["questions"],
            "image": png(noise_image(index)),
            "questions": [{"id": str(n), "question": text} for n, text in enumerate(texts)],
            **columns,
        }
        for index, texts in enumerate(asked)
    ]


def answered(job: JobSpec, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a job answers them."""
    prepared = Encode(job, {})(sample_table(rows))
    table: pa.Table = Generate(job, {}, run_id="r", threads=1)(prepared)
    return table.to_pylist()


def check_alone(answers: Sequence[dict[str, Any]]) -> None:
    """Against `generate` on each prompt alone, by a processor and a model that are whole."""
    processor, model = whole()
    for answer in answers:
        assert answer["status"] == "ok", answer["error_message"]
        image = noise_image(answer["source_index"])
        inputs = processor(text=answer["prompt"], images=image, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, start:]
        said = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert (answer["prompt_tokens"], answer["answer"]) == (start, said)


MIXED = [questions(5, seed=1), questions(1, seed=2), questions(3, seed=3)]


# Right padding gives empty or wrong answers in batches


@pytest.mark.parametrize("kind", ENGINES)
def test_a_tokenizer_that_pads_right_changes_no_answer_of_a_batch(folder: Path, kind: str) -> None:
    edit(folder / "tokenizer_config.json", padding_side="right")
    model, processor = loaded(folder)
    cases = cases_of(4, 3)
    outcomes = engine_for(kind, model, processor).submit([request_of(processor, c) for c in cases])
    for [answer], case in zip(outcomes, cases, strict=True):
        processor, model = whole()
        check(answer, alone(model, processor, case))


def test_a_job_with_a_tokenizer_that_pads_right(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", padding_side="right")
    check_alone(answered(job_of(folder), rows_of(MIXED)))


# A pad token that is the end token confuses masks


@pytest.fixture
def padding_with_the_end(folder: Path) -> Path:
    edit(folder / "tokenizer_config.json", pad_token="</s>")
    edit(folder / "generation_config.json", pad_token_id=2)
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", pad_token_id=2)
    edit(folder / "config.json", text_config={**config["text_config"], "pad_token_id": 2})
    return folder


def test_end_tokens_within_a_prompt_are_read_where_they_pad_too(padding_with_the_end: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A red circle."}]
    rows = rows_of(MIXED, conversation=turns)
    answers = answered(job_of(padding_with_the_end), rows)
    assert all("A red circle.</s>USER" in answer["prompt"] for answer in answers)
    check_alone(answers)


@pytest.mark.parametrize("kind", ENGINES)
def test_answers_end_at_the_end_token_where_it_pads_too(
    padding_with_the_end: Path, kind: str
) -> None:
    model, processor = loaded(padding_with_the_end)
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id
    cases = cases_of(4, 3)
    requests = [request_of(processor, case) for case in cases]
    reasons = set()
    for [answer], case in zip(
        engine_for(kind, model, processor).submit(requests), cases, strict=True
    ):
        processor, model = whole()
        check(answer, alone(model, processor, case))
        reasons.add(answer.finish_reason)
    assert reasons == {"stop", "length"}


# Truncation cuts image placeholders


@pytest.fixture
def truncating(folder: Path) -> Path:
    cut = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", truncation=cut)
    edit(folder / "tokenizer_config.json", model_max_length=12, truncation=True, max_length=12)
    return folder


def test_a_tokenizer_that_truncates_cuts_no_image_and_no_question(truncating: Path) -> None:
    check_alone(answered(job_of(truncating), rows_of(MIXED)))


def test_a_tokenizer_that_pads_to_a_length_adds_nothing(folder: Path) -> None:
    pad = {"strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None}
    what = {"pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}
    edit(folder / "tokenizer.json", padding={**pad, **what})
    check_alone(answered(job_of(folder), rows_of(MIXED)))


def test_a_prompt_that_is_too_long_fails_and_is_not_cut(truncating: Path) -> None:
    long = "What is in this picture? " * 200
    rows = rows_of([["Who?", long], ["Who?"]])
    short, failed, other = answered(job_of(truncating), rows)
    check_alone([short, other])
    assert (failed["status"], failed["error_class"]) == ("failed", "PromptTooLong")
    assert f"({PLACES} of them the image)" in failed["error_message"]


# Several images in one prompt of a mixed batch


def pixels_of(processor: Any, image: Image.Image) -> ImagePixels:
    return ImagePixels(
        resized(processor, image), hashlib.sha256(image.tobytes()).hexdigest(), image.size
    )


def several(processor: Any, numbers: Sequence[int], text: str, longest: int) -> tuple[Any, Request]:
    """What the processor makes of a prompt about so many images, and the engine's request."""
    images = [noise_image(number) for number in numbers]
    prompt = f"USER: {'<image>' * len(images)}\n{text} ASSISTANT:"
    inputs = processor(text=prompt, images=images or None, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    end = max((n for n, i in enumerate(ids) if i == processor.image_token_id), default=-1) + 1
    prefix = Prefix(ids[:end], [pixels_of(processor, image) for image in images])
    return inputs, Request(prefix, [Branch(ids[end:], longest)])


def mixed(processor: Any) -> Iterator[tuple[Any, Request]]:
    texts = questions(7, seed=5)
    # The same images again, in the other order, twice in one prompt, and none at all.
    for n, numbers in enumerate([(0,), (0, 1), (1, 0), (2,), (2, 2), (), (3, 0, 1)]):
        yield several(processor, numbers, texts[n], 4 + n)


@pytest.mark.parametrize("room", [2, 16])
@pytest.mark.parametrize("kind", ENGINES)
def test_prompts_with_one_image_several_and_none_are_answered_as_alone(
    kind: str, room: int
) -> None:
    processor, model = whole()
    asked = list(mixed(processor))
    engine = engine_for(kind, model, processor, room=room)
    outcomes = engine.submit([request for _, request in asked])
    for [answer], (inputs, request) in zip(outcomes, asked, strict=True):
        longest = request.branches[0].max_new_tokens
        tokens = model.generate(
            **inputs, max_new_tokens=longest, do_sample=False, eos_token_id=list(EOS)
        )
        expected = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.token_ids) == [token for token in expected if token not in EOS]
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ENGINES)
def test_the_order_of_images_counts(kind: str) -> None:
    processor, model = whole()
    pairs = [several(processor, numbers, "Which is red?", 8)[1] for numbers in ((0, 1), (1, 0))]
    [[one], [other]] = engine_for(kind, model, processor, eos=()).submit(pairs)
    assert one.token_ids != other.token_ids


# A system prompt changes whether images are prepared


def test_a_system_prompt_changes_nothing_about_images(folder: Path) -> None:
    rows = rows_of(MIXED)
    in_rows = rows_of(MIXED, conversation=[{"role": "system", "content": "Be brief."}])
    plain, spec, row = (
        unfolded(Encode(job, {})(sample_table(each)))
        for job, each in (
            (job_of(folder), rows),
            (job_of(folder, system_prompt="Be brief."), rows),
            (job_of(folder), in_rows),
        )
    )
    for before, *after in zip(plain, spec, row, strict=True):
        for each in after:
            assert each["pixels"] == before["pixels"]
            assert len(each["pixels"]) == SIDE * SIDE * 3
            for prompt in each["prompts"]:
                assert prompt["prompt"].startswith("Be brief.")
                assert prompt["token_ids"].count(4) == PLACES
    check_alone(answered(job_of(folder, system_prompt="Be brief."), rows))
    check_alone(answered(job_of(folder), in_rows))


# 575 image tokens against 576 features


def test_a_processor_that_counts_one_token_too_few_is_answered_all_the_same(folder: Path) -> None:
    edit(folder / "processor_config.json", num_additional_image_tokens=None)
    check_alone(answered(job_of(folder), rows_of(MIXED)))


@pytest.mark.parametrize(("surplus", "written"), [(-1, PLACES - 1), (1, PLACES + 1)])
def test_tokens_that_are_not_as_many_as_the_features_fail_their_row_alone(
    folder: Path, surplus: int, written: int
) -> None:
    job = job_of(folder)
    rows = Encode(job, {})(sample_table(rows_of([["Who?"], ["How many?"]]))).to_pylist()
    prompt = rows[0]["lines"][0]["prompts"][0]
    place = prompt["token_ids"].index(4)
    prompt["token_ids"][place : place + 1] = [4] * (1 + surplus)
    prepared = table_of(rows, PREPARED)
    failed, fine = Generate(job, {}, run_id="r", threads=1)(prepared).to_pylist()
    check_alone([fine])
    assert (failed["status"], failed["error_class"]) == ("failed", "TokenFeatureMismatch")
    assert f"{written} image tokens, the model gives {PLACES} features" in failed["error_message"]
    assert "num_additional_image_tokens" in failed["error_message"]
