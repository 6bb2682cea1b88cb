"""The accelerator step: prepared rows to answer rows."""

import datetime
import io
import json

import pyarrow as pa
import pytest
import torch

from pipeline.encode import Encode
from pipeline.generate import Generate
from pipeline.tokenise import alike
from schemas.job import JobSpec
from schemas.tables import SAMPLE, answered_schema, table_of, with_keep
from tests.engine_cases import Counted
from tests.lines import folded, sample_table, unfolded
from tests.models import (
    BYTE_VOCABULARY,
    byte_tokenizer,
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
    return Encode(job_of(), KEEP)(sample_table(SAMPLES, KEEP))


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
    for row in unfolded(prepared):
        for prompt in row.get("prompts", ()):
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
    samples = sample_table([sample(0)], KEEP)
    rows = Generate(job, KEEP, run_id="r")(Encode(job, KEEP)(samples)).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped"]


class Recorder:
    """An engine that remembers what another one is asked."""

    def __init__(self, engine):
        self._engine = engine
        self.requests = []

    def submit(self, requests):
        self.requests += requests
        return self._engine.submit(requests)


def recorded(job, table):
    """The answers, and the requests that they took."""
    generate = Generate(job, KEEP, run_id="r")
    generate._rounds.engine = recorder = Recorder(generate._rounds.engine)
    return generate(Encode(job, KEEP)(table)).to_pylist(), recorder.requests


def own(*questions):
    return [{"id": id, "question": question} for id, question in questions]


def lines_on_one_image():
    """Three lines with questions of their own, of which two are alike."""
    asked = [own(("a", "How many?")), own(("a", "Who?"), ("b", "How many?")), []]
    units = [UNITS, ["questions"], UNITS]
    return [
        sample(index, image=png(0), questions=questions, units=unit)
        for index, questions, unit in zip((7, 3, 5), asked, units, strict=True)
    ]


def lines_table(*groups):
    return table_of([folded(*lines) for lines in groups], with_keep(SAMPLE, KEEP))


def test_lines_on_one_image_are_one_request_and_answered_as_if_alone():
    lines = lines_on_one_image()
    end = {"source_uri": "a.tar", "shard_identity": "etag", "rows_total": 8}
    rows, requests = recorded(job_of(), lines_table([end], lines, [sample(1)]))
    assert [(r["source_index"], r["question_id"], r["row_answers"]) for r in rows] == [
        (None, None, None),
        (7, "caption", 3),
        (7, "colour", 3),
        (7, "a", 3),
        (3, "a", 2),
        (3, "b", 2),
        (5, "caption", 3),
        (5, "colour", 3),
        (5, None, 3),
        (1, "caption", 3),
        (1, "colour", 3),
        (1, None, 3),
    ]
    assert [len(request.branches) for request in requests] == [4, 2]
    encode, generate = Encode(job_of(), KEEP), Generate(job_of(), KEEP, run_id="r")
    each = [generate(encode(sample_table([line], KEEP))) for line in [end, *lines, sample(1)]]
    alone = [row for table in each for row in table.to_pylist()]
    differing = {"answered_at": None, "mean_logprob": None}
    assert [{**row, **differing} for row in rows] == [{**row, **differing} for row in alone]
    for row, other in zip(rows, alone, strict=True):
        assert row["mean_logprob"] == pytest.approx(other["mean_logprob"], abs=1e-5)


def test_a_conversation_of_one_line_is_none_of_the_others():
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    job = job_of(output={"path": "y", "prompts": True})
    lines = [sample(0, units=["colour"]), sample(1, image=png(0), conversation=turns)]
    lines[1]["units"] = ["colour"]
    rows, _ = recorded(job, lines_table(lines))
    assert [row["prompt"].count("B.") for row in rows] == [0, 1]


def test_an_image_of_several_shards_is_looked_at_once():
    rows = [sample(n, source_uri=f"{n}.tar", image=png(0), units=["colour"]) for n in range(3)]
    generate = Generate(job_of(), KEEP, run_id="r")
    looked_at = []
    tower = generate._rounds.engine._looker._model.model.vision_tower
    tower.register_forward_pre_hook(
        lambda _, args, kwargs: looked_at.append(len(kwargs.get("pixel_values", *args))),
        with_kwargs=True,
    )
    answers = generate(Encode(job_of(), KEEP)(sample_table([*rows, sample(9)], KEEP))).to_pylist()
    assert sum(looked_at) == 2
    assert [row["source_uri"] for row in answers[:3]] == ["0.tar", "1.tar", "2.tar"]
    assert len({row["answer"] for row in answers[:3]}) == 1


def test_kept_values_go_with_the_lines_of_a_sliced_batch():
    prepared = Encode(job_of(), KEEP)(lines_table([sample(1)], lines_on_one_image(), [sample(2)]))
    rows = Generate(job_of(), KEEP, run_id="r")(prepared.slice(1, 2)).to_pylist()
    assert {(row["source_index"], row["keep.url"]) for row in rows} == {
        (n, f"http://{n}") for n in (7, 3, 5, 2)
    }


# More than one answer to a question


WARM = {"temperature": 0.9, "top_p": 0.95, "n": 5, "max_new_tokens": 8}
NAMED = ("source_uri", "source_index", "question_id", "turn", "sample_number")


def by_identity(rows):
    """The answers, each under the row's identity."""
    found = {tuple(row[name] for name in NAMED): row["answer"] for row in rows}
    assert len(found) == len(rows)
    return found


def answers_to(job, rows):
    return Generate(job, KEEP, run_id="r")(Encode(job, KEEP)(sample_table(rows, KEEP))).to_pylist()


def sampled_rows():
    asked = own(("a", "How many?"), ("b", "Who?"))
    return [sample(n, questions=asked, image=png(n // 2)) for n in range(6)]


@pytest.fixture(scope="module")
def one_by_one():
    """Five samples of each question, a row at a time."""
    job = job_of(generate=WARM)
    encode, generate = Encode(job, KEEP), Generate(job, KEEP, run_id="r")
    tables = [generate(encode(sample_table([row], KEEP))) for row in sampled_rows()]
    return by_identity([row for table in tables for row in table.to_pylist()])


def test_samples_are_the_same_for_any_batch_and_order(one_by_one):
    rows = sampled_rows()
    assert by_identity(answers_to(job_of(generate=WARM), rows[::-1])) == one_by_one
    small = {"generate": {"kv_budget_bytes": 60_000}}
    assert by_identity(answers_to(job_of(generate=WARM, resources=small), rows)) == one_by_one


def test_samples_of_one_question_and_of_alike_rows_differ(one_by_one):
    assert len(one_by_one) == 6 * 4 * 5
    for index, question_id in {key[1:3] for key in one_by_one}:
        own = [one_by_one["a.tar", index, question_id, 0, number] for number in range(5)]
        assert len(set(own)) > 1
        if index % 2:
            twin = [one_by_one["a.tar", index - 1, question_id, 0, n] for n in range(5)]
            assert own != twin


def test_another_seed_draws_other_answers(one_by_one):
    other = answers_to(job_of(generate={**WARM, "seed": 1}), sampled_rows()[:1])
    found = by_identity(other)
    assert all(found[key] != one_by_one[key] or len(found[key]) < 3 for key in found)


def test_every_sample_of_what_cannot_be_asked_is_a_row():
    rows = answers_to(job_of(generate=WARM), [sample(0, image=b"broken")])
    assert [(row["question_id"], row["sample_number"], row["status"]) for row in rows] == [
        *(("caption", n, "failed") for n in range(5)),
        *(("colour", n, "failed") for n in range(5)),
        (None, 0, "skipped"),
    ]
    assert {row["row_answers"] for row in rows} == {11}


def test_a_question_may_be_greedy_beside_others_that_are_not(answers):
    calm = {"id": "colour", "prompt": "Which colour?", "temperature": 0, "max_new_tokens": 5}
    job = job_of(ask=[{"id": "caption", "prompt": "Describe the image."}, calm], generate=WARM)
    rows = answers_to(job, [sample(1, units=["caption", "colour"])])
    assert [row["question_id"] for row in rows] == ["caption"] * 5 + ["colour"]
    assert rows[-1]["answer"] == answers[5]["answer"]


def test_samples_share_the_prompt_but_for_its_last_token():
    job = job_of(generate=WARM)
    _, [request] = recorded(job, sample_table([sample(0, units=["caption"])], KEEP))
    assert len(request.branches) == 5
    assert {len(branch.token_ids) for branch in request.branches} == {1}


def test_an_answer_is_cut_before_its_stop_string(answers):
    first = answers[0]["answer"]
    stop = first[3:5]
    [row, *_] = answers_to(job_of(generate={"max_new_tokens": 8, "stop": [stop]}), [sample(0)])
    assert row["answer"] == first[: first.index(stop)].strip()
    assert row["finish_reason"] == "stop"
    assert 0 < row["output_tokens"] < answers[0]["output_tokens"]


# Choices


CHOICES = ["red", "dark red", "yes", "no, there is none"]


def chosen_alone(prompt, image, *, length_normalise):
    """The probability of each choice, one at a time through transformers."""
    processor, model = tiny_processor(), tiny_model()
    end, logprobs = model.generation_config.eos_token_id, []
    start = processor(text=prompt, images=image, return_tensors="pt")["input_ids"].shape[1]
    for choice in CHOICES:
        inputs = processor(text=f"{prompt} {choice}", images=image, return_tensors="pt")
        with torch.inference_mode():
            found = model(**inputs).logits[0, start - 1 :].log_softmax(-1)
        ids = [*inputs["input_ids"][0, start:].tolist(), end]
        total = sum(found[n, token].item() for n, token in enumerate(ids))
        logprobs.append(total / len(ids) if length_normalise else total)
    return torch.tensor(logprobs).softmax(-1).tolist()


@pytest.mark.parametrize("length_normalise", [False, True])
def test_choices_have_the_probabilities_that_transformers_gives_one_at_a_time(length_normalise):
    ask = [
        {"id": "colour", "prompt": "Which?", "choices": CHOICES},
        {"from": "questions", "choices": CHOICES},
    ]
    ask = [{**each, "length_normalise": length_normalise} for each in ask]
    job = job_of(ask=ask, output={"path": "y", "prompts": True})
    units = ["colour", "questions"]
    asked = [sample(n, units=units, questions=own(("a", "How many?"))) for n in range(3)]
    rows = answers_to(job, asked)
    assert len(rows) == 6
    for row in rows:
        image = noise_image(row["source_index"])
        expected = chosen_alone(row["prompt"], image, length_normalise=length_normalise)
        probs = [each["prob"] for each in row["choice_probs"]]
        assert [each["choice"] for each in row["choice_probs"]] == CHOICES
        assert probs == pytest.approx(expected, abs=1e-4)
        assert sum(probs) == pytest.approx(1.0, abs=1e-5)
        assert row["answer"] == CHOICES[probs.index(max(probs))]
        assert (row["status"], row["finish_reason"]) == ("ok", "choice")
        assert row["mean_logprob"] < 0
        assert row["sample_number"] == 0


def test_choices_are_one_request_with_one_prefix_that_holds_the_question():
    job = job_of(ask=[{"id": "colour", "prompt": "Which?", "choices": CHOICES}])
    table = Encode(job, KEEP)(sample_table([sample(0, units=["colour"])], KEEP))
    [row] = unfolded(table)
    [prompt] = row["prompts"]
    _, [request] = recorded(job, sample_table([sample(0, units=["colour"])], KEEP))
    assert len(request.branches) == len(CHOICES)
    read = len(request.prefix.token_ids) + sum(len(b.token_ids) for b in request.branches)
    given = sum(len(ids) for ids in prompt["choices"]["token_ids"])
    assert read == len(prompt["token_ids"]) - 1 + len(CHOICES) + given


def test_of_several_questions_with_choices_each_is_read_once():
    texts = ("Which of all the colours is it?", "Is there anything behind it, and of what colour?")
    asks = [{"id": text[:2], "prompt": text, "choices": CHOICES} for text in texts]
    job = job_of(ask=asks)
    rows = sample_table([sample(0, units=[*job.units])], KEEP)
    encoded = Encode(job, KEEP)(rows)
    generate = Generate(job, KEEP, run_id="r")
    generate(encoded)  # From then on there are rows for so many choices.
    counted = Counted(generate._rounds.engine)
    together = generate(encoded).to_pylist()
    [row] = unfolded(encoded)
    ids = [prompt["token_ids"] for prompt in row["prompts"]]
    given = sum(len(i) for p in row["prompts"] for i in p["choices"]["token_ids"])
    shared = alike(*ids)
    # Each choice but the first begins with a token that is read again, to be scored behind it.
    most = len(ids[0]) + len(ids[1]) - shared + given + len(asks) * (len(CHOICES) - 1) + 1
    assert sum(counted.passes) <= most
    for ask, answer in zip(asks, together, strict=True):
        alone = job_of(ask=[ask])
        table = Encode(alone, KEEP)(sample_table([sample(0, units=[*alone.units])], KEEP))
        [expected] = Generate(alone, KEEP, run_id="r")(table).to_pylist()
        probs, wanted = (
            [each["prob"] for each in one["choice_probs"]] for one in (answer, expected)
        )
        assert probs == pytest.approx(wanted, abs=1e-5)
        assert answer["answer"] == expected["answer"]


def test_a_choice_that_cannot_be_scored_fails_its_question(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    job = job_of(
        ask=[{"id": "colour", "prompt": "Which?", "choices": CHOICES}],
        model={"path": str(write_checkpoint(tmp_path, model=model))},
    )
    [row] = answers_to(job, [sample(0, units=["colour"])])
    assert (row["status"], row["error_class"]) == ("failed", "NonFiniteLogits")
    assert row["choice_probs"] is None


# JSON


def json_job(tmp_path, schema, **generate):
    processor = tiny_processor(tokenizer=byte_tokenizer())
    model = tiny_model(vocab_size=BYTE_VOCABULARY + 20)
    folder = write_checkpoint(tmp_path, model=model, processor=processor)
    ask = [
        {"id": "caption", "prompt": "Describe the image.", "json_schema": schema},
        {"id": "colour", "prompt": "Which colour?"},
    ]
    return job_of(ask=ask, model={"path": str(folder)}, generate=generate)


def test_answers_are_json_of_the_schema_or_incomplete(tmp_path):
    schema = {"type": "array", "items": {"enum": ["a b", "c"]}, "minItems": 2, "maxItems": 3}
    job = json_job(tmp_path, schema, temperature=1.0, n=4, max_new_tokens=12)
    rows = answers_to(job, [sample(n, units=["caption", "colour"]) for n in range(4)])
    held = [row for row in rows if row["question_id"] == "caption"]
    assert len(held) == 16
    for row in held:
        if row["status"] == "ok":
            found = json.loads(row["answer"])
            assert 2 <= len(found) <= 3
            assert set(found) <= {"a b", "c"}
        else:
            assert (row["error_stage"], row["error_class"]) == ("generate", "IncompleteJson")
            assert row["answer"] is None
    assert {row["status"] for row in held} == {"ok", "failed"}
    assert {row["status"] for row in rows if row["question_id"] == "colour"} == {"ok"}
