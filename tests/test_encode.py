"""The CPU step: samples to pixels and prompts, with every failure in its entry."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from transformers import ConvNextImageProcessorPil

from pipeline.encode import Encode
from schemas.errors import SpecError
from schemas.job import JobSpec
from schemas.tables import PREPARED, SAMPLE, table_of, with_keep
from tests.counted import COUNTING, counted, decodes
from tests.hostile_decoders import hostile, path_with_hostile_decoders
from tests.lines import folded, sample_table, unfolded
from tests.models import (
    FALLBACK_VOCABULARY,
    byte_tokenizer,
    fallback_tokenizer,
    noise_image,
    shared_checkpoint,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    write_checkpoint,
)
from tests.shards import saved

KEEP = {"url": pa.string(), "at": pa.timestamp("ns")}
CAPTION = {"id": "caption", "prompt": "Describe the image."}
COLOUR = {"id": "colour", "prompt": "Which colour?", "max_new_tokens": 5}
OWN = {"from": "questions"}


def job_of(*ask, model=None, **source):
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x", **source},
            "ask": ask or (CAPTION, COLOUR, OWN),
            "model": {"path": str(shared_checkpoint()), **(model or {})},
            "output": {"path": "y"},
            "generate": {"max_new_tokens": 20},
        }
    )


IMAGE = noise_image(5, width=50, height=70)
DATA = saved(IMAGE, "PNG")


def sample(index=0, **columns):
    row = {
        "source_uri": "a.tar",
        "source_index": index,
        "shard_identity": "etag",
        "sample_id": f"s{index}",
        "units": ["caption", "colour", "questions"],
        "image": DATA,
        "questions": [{"id": "q0", "question": "How many?"}],
    }
    return {**row, **columns}


def encode(encoder, *rows):
    table = encoder(sample_table(rows))
    assert table.schema == PREPARED
    return unfolded(table)


def outcomes(row):
    return [
        (p["question_id"], p["status"], (p["error"] or {}).get("class")) for p in row["prompts"]
    ]


@pytest.fixture(scope="module")
def encoder():
    return Encode(job_of(), {})


def test_each_wanted_question_becomes_a_prompt_in_the_specs_order(encoder):
    [row] = encode(encoder, sample())
    assert [(p["question_id"], p["question"], p["max_new_tokens"]) for p in row["prompts"]] == [
        ("caption", "Describe the image.", 20),
        ("colour", "Which colour?", 5),
        ("q0", "How many?", 20),
    ]
    assert row["prompts"][0]["prompt"] == "USER: <image>\nDescribe the image. ASSISTANT:"


def test_units_that_are_answered_already_are_not_asked_again(encoder):
    [row] = encode(encoder, sample(units=["colour"]))
    assert [p["question_id"] for p in row["prompts"]] == ["colour"]


def test_token_ids_are_the_processors_own(encoder):
    [row] = encode(encoder, sample())
    for prompt in row["prompts"]:
        whole = tiny_processor()(text=prompt["prompt"], images=IMAGE)
        assert prompt["token_ids"] == whole["input_ids"][0]


def test_pixels_are_the_image_resized_and_the_rest_describes_the_file(encoder):
    [row] = encode(encoder, sample())
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixels_shape"])
    expected = tiny_processor().image_processor(images=IMAGE, do_rescale=False, do_normalize=False)
    assert np.array_equal(np.moveaxis(pixels, -1, 0), expected["pixel_values"][0])
    assert row["image_sha256"] == hashlib.sha256(DATA).hexdigest()
    assert (row["image_width"], row["image_height"]) == (50, 70)


def test_a_template_that_writes_the_start_token_gets_no_second_one(tmp_path):
    template = "<s>USER: <image>\n{{ messages[-1].content[-1].text }} ASSISTANT:"
    folder = write_checkpoint(tmp_path, processor=tiny_processor(chat_template=template))
    [row] = encode(Encode(job_of(model={"path": str(folder)}), {}), sample())
    bos = tiny_processor().tokenizer.bos_token_id
    assert row["prompts"][0]["token_ids"].count(bos) == 1


def test_a_checkpoint_without_a_template_gets_llava_1_5s(tmp_path):
    folder = write_checkpoint(tmp_path, processor=tiny_processor(chat_template=None))
    model = {"path": str(folder), "system_prompt": "Be brief."}
    [row] = encode(Encode(job_of(model=model), {}), sample())
    assert row["prompts"][0]["prompt"] == (
        "Be brief. USER: <image>\nDescribe the image. ASSISTANT:"
    )


def test_earlier_turns_come_before_the_question(encoder):
    turns = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat."},
    ]
    [row] = encode(encoder, sample(conversation=turns))
    assert row["prompts"][1]["prompt"] == (
        "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:"
    )


def test_end_marks_pass_untouched_and_rows_keep_their_order(encoder):
    end = {"source_uri": "a.tar", "shard_identity": "etag", "rows_total": 2}
    rows = encode(encoder, sample(0), end, sample(1))
    assert [row["source_index"] for row in rows] == [0, None, 1]
    assert {k: v for k, v in rows[1].items() if v is not None} == end


def test_an_empty_batch_is_an_empty_batch(encoder):
    assert encode(encoder) == []


def test_kept_columns_travel_with_their_types():
    row = {**sample(), "keep.url": "http://x", "keep.at": 1_700_000_000_123_456_789}
    table = Encode(job_of(CAPTION), KEEP)(sample_table([{**row, "units": ["caption"]}], KEEP))
    assert table.schema == with_keep(PREPARED, KEEP)
    assert table["keep.at"].cast(pa.list_(pa.int64())).to_pylist() == [[1_700_000_000_123_456_789]]


ERROR = {"stage": "read", "class": "ShardUnreadable", "message": "cut off"}


def test_a_row_that_cannot_be_read_is_one_failed_entry_without_question(encoder):
    [row] = encode(encoder, sample(image=None, error=ERROR))
    assert outcomes(row) == [(None, "failed", "ShardUnreadable")]
    assert row["pixels"] is None


def test_an_image_that_cannot_be_decoded_fails_every_known_question(encoder):
    [row] = encode(encoder, sample(image=DATA[:100]))
    assert outcomes(row) == [(q, "failed", "ImageCorrupt") for q in ("caption", "colour", "q0")]
    assert row["image_sha256"] == hashlib.sha256(DATA[:100]).hexdigest()
    assert row["image_width"] is None
    assert row["pixels"] is None


def test_an_image_with_too_many_pixels_fails():
    [row] = encode(Encode(job_of(CAPTION, max_image_pixels=100), {}), sample(units=["caption"]))
    assert outcomes(row) == [("caption", "failed", "ImageTooLarge")]


def test_an_image_of_too_many_bytes_is_not_decoded():
    job = job_of(CAPTION, max_image_bytes=len(DATA) - 1)
    [row] = encode(Encode(job, {}), sample(units=["caption"]))
    assert outcomes(row) == [("caption", "failed", "ImageTooLarge")]
    assert row["image_sha256"] == hashlib.sha256(DATA).hexdigest()


def test_truncated_images_are_answered_where_that_is_allowed(encoder):
    cut = sample(units=["caption"], image=DATA[: len(DATA) // 2])
    [strict] = encode(encoder, cut)
    [lenient] = encode(Encode(job_of(CAPTION, allow_truncated=True), {}), cut)
    assert outcomes(strict) == [("caption", "failed", "ImageCorrupt")]
    assert outcomes(lenient) == [("caption", None, None)]
    assert lenient["image_height"] == 70


def test_fast_takes_large_jpegs_at_a_fraction_and_other_images_as_they_are(encoder):
    image = Image.effect_mandelbrot((640, 480), (-2.0, -1.2, 1.0, 1.2), 60).convert("RGB")
    samples = [sample(n, image=file) for n, file in enumerate([saved(image, "JPEG"), DATA])]
    large, small = encode(encoder, *samples)
    fast_large, fast_small = encode(Encode(job_of(decode="fast"), {}), *samples)
    assert fast_small == small
    assert (fast_large["image_width"], fast_large["image_height"]) == (640, 480)
    pairs = [np.frombuffer(row["pixels"], np.uint8).astype(int) for row in (large, fast_large)]
    assert 0 < np.abs(pairs[0] - pairs[1]).mean() < 3
    assert {**large, "pixels": None} == {**fast_large, "pixels": None}


def test_fast_is_refused_for_a_processor_that_nobody_knows(tmp_path):
    processor = tiny_processor()
    processor.image_processor = ConvNextImageProcessorPil(size={"shortest_edge": 32})
    model = {"path": str(write_checkpoint(tmp_path, processor=processor))}
    [row] = encode(Encode(job_of(CAPTION, model=model), {}), sample(units=["caption"]))
    assert row["pixels_shape"] == [32, 32, 3]
    with pytest.raises(SpecError, match=r"source\.decode is fast, but .*ConvNext.* set .* exact"):
        Encode(job_of(CAPTION, model=model, decode="fast"), {})


def test_an_image_that_ends_the_process_fails_alone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", path_with_hostile_decoders())
    images = [DATA, hostile("segv"), DATA, hostile("surprise:x"), DATA[:99], DATA]
    rows = encode(Encode(job_of(), {}), *[sample(n, image=i) for n, i in enumerate(images)])
    failures = [None, "DecoderCrashed", None, "DecoderCrashed", "ImageCorrupt", None]
    assert [outcomes(row)[0][2] for row in rows] == failures
    assert [len(row["prompts"]) for row in rows] == [3] * 6
    assert rows[1]["prompts"][0]["error"]["stage"] == "decode"
    assert rows[2]["pixels"] == rows[0]["pixels"]


def test_what_is_wrong_with_the_image_is_told_first(encoder):
    questions = [{"id": "q0", "question": "a <image> b"}]
    [row] = encode(encoder, sample(questions=questions, image=b"x"))
    assert outcomes(row) == [
        (q, "failed", "ImageUnidentified") for q in ("caption", "colour", "q0")
    ]
    assert [p["prompt"] for p in row["prompts"]] == [None] * 3
    assert [p["token_ids"] for p in row["prompts"]] == [None] * 3


def test_a_row_whose_questions_all_fail_takes_no_pixels_along(encoder):
    questions = [{"id": "q0", "question": "a <image> b"}]
    [row] = encode(encoder, sample(units=["questions"], questions=questions))
    assert (row["pixels"], row["image_width"]) == (None, 50)


def test_the_same_question_of_many_rows_is_asked_of_each(encoder):
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    alone, after, again = encode(
        encoder, sample(0), sample(1, conversation=turns), sample(2, units=["caption"])
    )
    assert after["prompts"][0]["prompt"] != alone["prompts"][0]["prompt"]
    assert again["prompts"] == alone["prompts"][:1]


def test_lines_on_one_image_are_asked_apart_and_it_is_decoded_once(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", COUNTING)
    log = tmp_path / "log"
    image = counted(DATA, log=log)
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    error = {"stage": "read", "class": "QuestionsMalformed", "message": "no list"}
    lines = [
        sample(5, image=image, units=["colour"]),
        sample(2, image=image, units=["caption"], conversation=turns),
        sample(9, image=image, units=["questions"], questions=None, questions_error=error),
        sample(7, image=image, units=["questions"]),
    ]
    table = Encode(job_of(), {})(table_of([folded(*lines)], SAMPLE))
    [row] = table.to_pylist()
    assert decodes(log) == 1
    assert [(line["source_index"], line["sample_id"], line["units"]) for line in row["lines"]] == [
        (5, "s5", ["colour"]),
        (2, "s2", ["caption"]),
        (9, "s9", ["questions"]),
        (7, "s7", ["questions"]),
    ]
    alone = [encode(encoder, {**line, "image": DATA})[0] for line in lines]
    assert [line["prompts"] for line in row["lines"]] == [each["prompts"] for each in alone]
    assert row["pixels"] == alone[0]["pixels"]
    assert (row["image_width"], row["image_height"]) == (50, 70)


def test_an_image_that_cannot_be_decoded_fails_every_line(encoder):
    error = {"stage": "read", "class": "FilterFailed", "message": "no"}
    lines = [
        sample(0, image=b"x"),
        sample(1, image=b"x", units=["questions"], questions=[]),
        sample(2, image=b"x", units=["colour"], image_error=error),
    ]
    rows = unfolded(encoder(table_of([folded(*lines)], SAMPLE)))
    assert [outcomes(row) for row in rows] == [
        [(q, "failed", "ImageUnidentified") for q in ("caption", "colour", "q0")],
        [(None, "skipped", "NoQuestions")],
        [("colour", "failed", "FilterFailed")],
    ]


def test_questions_that_cannot_be_known_fail_once_and_the_others_are_asked(encoder):
    error = {"stage": "read", "class": "QuestionsMalformed", "message": "no list"}
    [row] = encode(encoder, sample(questions=None, questions_error=error))
    assert outcomes(row) == [
        ("caption", None, None),
        ("colour", None, None),
        (None, "failed", "QuestionsMalformed"),
    ]


@pytest.mark.parametrize("questions", [None, []])
def test_a_row_without_questions_is_skipped_with_the_reason(encoder, questions):
    [row] = encode(encoder, sample(units=["questions"], questions=questions))
    assert outcomes(row) == [(None, "skipped", "NoQuestions")]
    assert "no questions" in row["prompts"][0]["error"]["message"]
    assert row["pixels"] is None


def test_a_broken_image_without_questions_is_skipped(encoder):
    [row] = encode(encoder, sample(units=["questions"], questions=[], image=b"x"))
    assert outcomes(row) == [(None, "skipped", "NoQuestions")]


@pytest.mark.parametrize("ids", [["caption"], ["a", "a"]])
def test_question_ids_that_collide_fail_once(encoder, ids):
    questions = [{"id": id, "question": "What?"} for id in ids]
    [row] = encode(encoder, sample(units=["questions"], questions=questions))
    assert outcomes(row) == [(None, "failed", "QuestionsMalformed")]
    assert repr(ids[0]) in row["prompts"][0]["error"]["message"]


def test_a_conversation_that_cannot_be_read_fails_every_question(encoder):
    error = {"stage": "prompt", "class": "ConversationMalformed", "message": "no list"}
    [row] = encode(encoder, sample(conversation_error=error))
    assert outcomes(row) == [
        (q, "failed", "ConversationMalformed") for q in ("caption", "colour", "q0")
    ]


def test_an_image_that_cannot_be_had_fails_every_question(encoder):
    error = {"stage": "read", "class": "ImageMissing", "message": "it is gone"}
    [row] = encode(encoder, sample(image=None, image_error=error))
    assert outcomes(row) == [(q, "failed", "ImageMissing") for q in ("caption", "colour", "q0")]
    assert row["prompts"][0]["error"] == error


def test_one_bad_question_leaves_the_others_alone(encoder):
    [row] = encode(encoder, sample(questions=[{"id": "q0", "question": "a <image> b"}]))
    assert outcomes(row) == [
        ("caption", None, None),
        ("colour", None, None),
        ("q0", "failed", "ImageTokenInText"),
    ]
    assert row["prompts"][2]["question"] == "a <image> b"
    assert row["pixels"] is not None


def test_a_prompt_that_leaves_no_room_for_the_answer_fails_with_the_figures(encoder):
    [row] = encode(encoder, sample(questions=[{"id": "q0", "question": "why " * 300}]))
    assert outcomes(row)[2] == ("q0", "failed", "PromptTooLong")
    message = row["prompts"][2]["error"]["message"]
    assert "20" in message
    assert "512" in message
    assert row["prompts"][2]["prompt"].startswith("USER: <image>")


def test_a_prompt_that_just_fits_is_asked(encoder):
    [row] = encode(encoder, sample())
    used = len(row["prompts"][2]["token_ids"])
    exact = job_of({**OWN, "max_new_tokens": 512 - used})
    over = job_of({**OWN, "max_new_tokens": 513 - used})
    for job, status in ((exact, None), (over, "failed")):
        [row] = encode(Encode(job, {}), sample(units=["questions"]))
        assert row["prompts"][0]["status"] == status


CHOICES = {"id": "colour", "prompt": "Which colour?", "choices": ["red", "dark red", "no, not."]}


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, byte_tokenizer, fallback_tokenizer])
def test_choices_are_tokenised_behind_the_whole_prompt(tmp_path, tokenizer):
    processor = tiny_processor(tokenizer=tokenizer())
    model = tiny_model(vocab_size=FALLBACK_VOCABULARY)
    folder = write_checkpoint(tmp_path, processor=processor, model=model)
    job = job_of(CHOICES, model={"path": str(folder)})
    [row] = encode(Encode(job, {}), sample(units=["colour"]))
    [prompt] = row["prompts"]
    assert prompt["status"] is None
    shared = prompt["choices"]["shared_tokens"]
    assert shared <= len(prompt["token_ids"])
    for choice, ids in zip(CHOICES["choices"], prompt["choices"]["token_ids"], strict=True):
        whole = processor(text=f"{prompt['prompt']} {choice}", images=IMAGE)["input_ids"][0]
        assert prompt["token_ids"][:shared] + ids == whole


def test_a_choice_that_changes_the_end_of_the_prompt_moves_where_all_begin(tmp_path):
    """`:` and `D` are one token of this tokenizer: they meet where no space comes between."""
    template = "USER: <image> {{ messages[-1].content[-1].text }}\n\n"
    processor = tiny_processor(chat_template=template)
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["\nD"])
    model = {"path": str(write_checkpoint(tmp_path, processor=processor))}
    ask = {**CHOICES, "choices": ["red", "Dark"]}
    [row] = encode(Encode(job_of(ask, model=model), {}), sample(units=["colour"]))
    [prompt] = row["prompts"]
    assert prompt["choices"]["shared_tokens"] == len(prompt["token_ids"]) - 1
    red, dark = prompt["choices"]["token_ids"]
    assert red[0] == prompt["token_ids"][-1] != dark[0]


def test_choices_that_the_tokens_do_not_tell_apart_are_a_failed_row():
    ask = {**CHOICES, "choices": ["red", "日", "本"]}
    [row] = encode(Encode(job_of(ask), {}), sample(units=["colour"]))
    assert outcomes(row) == [("colour", "failed", "ChoiceUnwritable")]
    assert "'本' are those of '日'" in row["prompts"][0]["error"]["message"]


def test_a_choice_that_does_not_fit_behind_its_prompt_fails():
    ask = {**CHOICES, "choices": ["red", "red " * 600 + "red"]}
    [row] = encode(Encode(job_of(ask), {}), sample(units=["colour"]))
    assert outcomes(row) == [("colour", "failed", "PromptTooLong")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content[0].url.host }}", "UndefinedError"),
        ("USER: {{ messages[-1].content[-1].text }} ASSISTANT:", "<image> 0 times"),
        ("USER: {{ messages[-1].content[-1].text }} <image>", "ends the prompt with <image>"),
    ],
)
def test_a_template_that_fails_is_a_failed_row(tmp_path, template, message):
    folder = write_checkpoint(tmp_path, processor=tiny_processor(chat_template=template))
    [row] = encode(
        Encode(job_of(CAPTION, model={"path": str(folder)}), {}), sample(units=["caption"])
    )
    assert outcomes(row) == [("caption", "failed", "TemplateFailed")]
    assert message in row["prompts"][0]["error"]["message"]


def test_a_row_that_is_filtered_out_is_skipped_and_its_image_never_decoded(encoder):
    skip = {"stage": "read", "class": "Filtered", "message": "source.where does not hold: a > 1"}
    [row] = encode(encoder, sample(image=None, skip=skip))
    assert outcomes(row) == [
        ("caption", "skipped", "Filtered"),
        ("colour", "skipped", "Filtered"),
        ("q0", "skipped", "Filtered"),
    ]
    assert row["pixels"] is None


def test_a_filtered_row_whose_questions_cannot_be_known_says_so(encoder):
    skip = {"stage": "read", "class": "Filtered", "message": "no"}
    error = {"stage": "read", "class": "QuestionsMalformed", "message": "bad"}
    [row] = encode(encoder, sample(questions=None, questions_error=error, skip=skip))
    assert outcomes(row)[-1] == (None, "failed", "QuestionsMalformed")
