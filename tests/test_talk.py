"""Questions that wait for answers: turns, conditions, prompts over earlier answers."""

import itertools
import json
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.encode import Encode
from pipeline.generate import Generate
from schemas.job import JobSpec
from tests.engine_cases import Counted
from tests.lines import sample_table
from tests.models import (
    noise_image,
    shared_checkpoint,
    tiny_model,
    tiny_processor,
)
from tests.test_generate import Recorder, png

TURNS = ("What is it?", "What colour has it?", "And what is behind it, to the left?")
TALK = {"id": "talk", "turns": TURNS}
ANIMAL = {"id": "animal", "prompt": "Which animal?", "max_new_tokens": 3}
BREED = {"id": "breed", "prompt": "Is the {{ answers.animal }} {{ word }}?"}


def job_of(*ask: dict[str, Any], **parts: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x"},
            "ask": ask,
            "model": {"path": str(shared_checkpoint())},
            "output": {"path": "y", "prompts": True},
            "generate": {"max_new_tokens": 8},
            **parts,
        }
    )


def table_of(job: JobSpec, count: int = 2, **columns: Any) -> pa.Table:
    about = {"units": list(job.units), "columns": json.dumps({"word": "big"}), **columns}
    rows = [
        {"source_uri": "a.tar", "source_index": n, "shard_identity": "e", "image": png(n), **about}
        for n in range(count)
    ]
    return sample_table(rows)


def answered(job: JobSpec, table: pa.Table | None = None) -> tuple[list[dict[str, Any]], Generate]:
    """The rows, and what gave them; its engine is a Recorder."""
    generate = Generate(job, {}, run_id="r", threads=1)
    generate._rounds.engine = Recorder(generate._rounds.engine)
    return generate(Encode(job, {})(table or table_of(job))).to_pylist(), generate


def from_scratch(prompt: str, index: int, longest: int = 8) -> str:
    """What the model alone says to a whole prompt."""
    processor, model = tiny_processor(), tiny_model()
    inputs = processor(text=prompt, images=noise_image(index), return_tensors="pt")
    with torch.inference_mode():
        whole = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    said = whole[0, inputs["input_ids"].shape[1] :]
    text: str = processor.tokenizer.decode(said, skip_special_tokens=True)
    return text.strip()


def places(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["source_index"], r["question_id"], r["turn"], r["sample_number"]) for r in rows]


def test_each_turn_sees_the_answers_before_as_if_it_were_asked_from_scratch() -> None:
    job = job_of(TALK, ANIMAL)
    rows, generate = answered(job)
    assert places(rows) == [
        (index, *each)
        for index in (0, 1)
        for each in [("talk", 0, 0), ("talk", 1, 0), ("talk", 2, 0), ("animal", 0, 0)]
    ]
    processor = tiny_processor()
    for index, talk in itertools.groupby(
        (r for r in rows if r["question_id"] == "talk"), key=lambda r: r["source_index"]
    ):
        messages: list[dict[str, Any]] = []
        for question, row in zip(TURNS, talk, strict=True):
            image = [] if messages else [{"type": "image"}]
            said = [*image, {"type": "text", "text": question}]
            messages.append({"role": "user", "content": said})
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            assert row["question"] == question
            assert row["prompt"] == prompt
            assert row["answer"] == from_scratch(prompt, index)
            content = [{"type": "text", "text": row["answer"]}]
            messages.append({"role": "assistant", "content": content})
    assert len(generate._rounds.engine.requests) == 2


def test_what_the_engine_has_read_of_a_conversation_is_not_read_again() -> None:
    """But the answer's text, which is tokenised afresh: that of a tiny model is no writing."""
    job = job_of({"id": "talk", "turns": TURNS[:2]})
    generate = Generate(job, {}, run_id="r", threads=1)
    counted = Counted(generate._rounds.engine)
    first, second = generate(Encode(job, {})(table_of(job, 1))).to_pylist()
    behind = second["prompt_tokens"] - first["prompt_tokens"]
    said = first["output_tokens"] + second["output_tokens"] - 2
    assert sum(counted.passes) <= first["prompt_tokens"] + behind + said


def test_samples_are_conversations_of_their_own() -> None:
    job = job_of({**TALK, "turns": TURNS[:2], "temperature": 1.0, "n": 3})
    rows, _ = answered(job, table_of(job, 1))
    assert places(rows) == [(0, "talk", turn, n) for turn in (0, 1) for n in range(3)]
    for first, second in zip(rows[:3], rows[3:], strict=True):
        assert f"ASSISTANT: {first['answer']}</s>" in second["prompt"]
    assert len({row["answer"] for row in rows[:3]}) == 3


def test_a_prompt_over_an_earlier_answer_and_a_column() -> None:
    rows, generate = answered(job_of(ANIMAL, BREED))
    for animal, breed in zip(rows[::2], rows[1::2], strict=True):
        assert breed["question"] == f"Is the {animal['answer']} big?"
        assert breed["answer"] == from_scratch(breed["prompt"], breed["source_index"])
    assert len(generate._rounds.engine.requests) == 2, "the image is read once for both"


def test_a_question_whose_condition_does_not_hold_is_skipped() -> None:
    rows, _ = answered(job_of(ANIMAL, {**BREED, "when": "animal == 'dog'"}))
    for animal, breed in zip(rows[::2], rows[1::2], strict=True):
        assert animal["status"] == "ok"
        assert (breed["status"], breed["error_class"]) == ("skipped", "NotAsked")
        assert breed["error_message"] == "ask.1.when does not hold: animal == 'dog'"


def test_a_condition_keeps_a_prompt_from_rows_that_cannot_fill_it_in() -> None:
    guarded = {"id": "guarded", "prompt": "{{ word }}?", "when": "word is not None"}
    job = job_of(ANIMAL, guarded, {**BREED, "when": "word is not None and animal is not None"})
    rows, _ = answered(job, table_of(job, 1, columns="{}"))
    assert [(r["status"], r["error_class"]) for r in rows[1:]] == [("skipped", "NotAsked")] * 2
    rows, _ = answered(job, table_of(job, 1))
    assert [r["status"] for r in rows] == ["ok"] * 3


def test_conditions_follow_each_other() -> None:
    third = {"id": "third", "prompt": "Why?", "when": "breed is None"}
    rows, _ = answered(job_of(ANIMAL, {**BREED, "when": "animal == 'dog'"}, third))
    assert [row["status"] for row in rows] == ["ok", "skipped", "ok"] * 2


def test_what_looks_at_a_failed_answer_is_skipped_and_its_turns_with_it() -> None:
    job = job_of(ANIMAL, BREED, TALK)
    rows, _ = answered(job, table_of(job, 1, image=b"broken"))
    assert [(r["question_id"], r["turn"], r["status"], r["error_class"]) for r in rows] == [
        ("animal", 0, "failed", "ImageUnidentified"),
        ("breed", 0, "skipped", "EarlierFailed"),
        ("talk", 0, "failed", "ImageUnidentified"),
        ("talk", 1, "skipped", "EarlierFailed"),
        ("talk", 2, "skipped", "EarlierFailed"),
    ]
    assert rows[1]["error_message"] == "the answer to 'animal' is missing: ImageUnidentified"


def test_a_missing_column_fails_its_question_alone() -> None:
    job = job_of(ANIMAL, BREED, {"id": "alone", "prompt": "{{ word }}?"})
    rows, _ = answered(job, table_of(job, 1, columns="{}"))
    assert [(r["status"], r["error_class"]) for r in rows] == [
        ("ok", None),
        ("failed", "TemplateFailed"),
        ("failed", "TemplateFailed"),
    ]


def test_a_turn_that_does_not_fit_the_context_fails_and_ends_the_conversation() -> None:
    long = "why and " * 400
    rows, _ = answered(job_of({"id": "talk", "turns": ("What?", long, "And?")}))
    assert [(r["turn"], r["status"], r["error_class"]) for r in rows[:3]] == [
        (0, "ok", None),
        (1, "failed", "PromptTooLong"),
        (2, "skipped", "EarlierFailed"),
    ]


def test_what_is_needed_and_answered_already_is_asked_and_not_written() -> None:
    job = job_of(ANIMAL, BREED)
    whole, _ = answered(job)
    rows, _ = answered(job, table_of(job, units=["breed"]))
    assert places(rows) == [(0, "breed", 0, 0), (1, "breed", 0, 0)]
    assert [r["answer"] for r in rows] == [r["answer"] for r in whole[1::2]]
    assert {r["row_answers"] for r in rows} == {1}


def test_choices_may_follow_an_answer_and_letters_stand_for_them() -> None:
    asked = {"choices": ("a red circle", "a dog"), "preset": "multiple-choice"}
    rows, _ = answered(job_of(ANIMAL, {**BREED, **asked}))
    for animal, breed in zip(rows[::2], rows[1::2], strict=True):
        assert breed["question"].startswith(f"Is the {animal['answer']} big?\nA. a red circle\nB.")
        assert [each["choice"] for each in breed["choice_probs"]] == [*asked["choices"]]
        assert breed["answer"] in asked["choices"]


def test_examples_stand_before_the_image() -> None:
    shots = [{"question": "2 + 2?", "answer": "4"}]
    rows, _ = answered(job_of({**ANIMAL, "shots": shots}, {**TALK, "shots": shots}))
    start = "USER: 2 + 2? ASSISTANT: 4</s>USER: <image>\n"
    assert all(row["prompt"].startswith(start) for row in rows)
    assert rows[3]["answer"] == from_scratch(rows[3]["prompt"], 0)


def test_turns_go_on_from_a_conversation_of_the_row() -> None:
    said = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    job = job_of({"id": "talk", "turns": TURNS[:2]})
    rows, _ = answered(job, table_of(job, 1, conversation=said))
    assert rows[1]["prompt"] == (
        f"USER: <image>\nA? ASSISTANT: B.</s>USER: {TURNS[0]} ASSISTANT: {rows[0]['answer']}</s>"
        f"USER: {TURNS[1]} ASSISTANT:"
    )
    assert rows[1]["answer"] == from_scratch(rows[1]["prompt"], 0)


@pytest.mark.parametrize("budget", [60_000, 400_000])
def test_talks_do_not_depend_on_what_else_is_asked(budget: int) -> None:
    asks = [TALK, ANIMAL, {**BREED, "when": "contains(animal, 'a') or width is None"}]
    room = {"generate": {"kv_budget_bytes": budget}}
    job = job_of(*asks, resources=room)
    together, _ = answered(job, table_of(job, 6))
    for index in range(6):
        alone, _ = answered(job, table_of(job, 6).slice(index, 1))
        of_it = [row for row in together if row["source_index"] == index]
        assert [r["answer"] for r in of_it] == [r["answer"] for r in alone]


def test_a_format_that_puts_the_text_before_the_image_works() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
        "{% for p in m.content if p.type == 'image' %}<image>{% endfor %}</s>{% endfor %}A:"
    )
    model = {"path": str(shared_checkpoint()), "chat_template": template}
    rows, _ = answered(job_of(ANIMAL, BREED, TALK, model=model))
    assert rows[0]["prompt"] == "user: Which animal?<image></s>A:"
    for row in rows:
        longest = 3 if row["question_id"] == "animal" else 8
        assert row["answer"] == from_scratch(row["prompt"], row["source_index"], longest)
