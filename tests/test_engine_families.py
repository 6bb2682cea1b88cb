"""Each family of models against transformers' `generate`, with the model's own processor."""

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.encode import Encode
from pipeline.engine.check import check_model
from pipeline.engine.choose import why_plain
from pipeline.engine.family import FAMILIES, ImageTokens
from pipeline.engine.load import load_model, load_processor
from pipeline.engine.pixels import normalised, pixel_table, resize_of
from pipeline.engine.request import Answer, Prefix, Request
from pipeline.engine.tiles import Tiles
from pipeline.generate import Generate
from schemas.errors import SpecError, TokenFeatureMismatch
from schemas.job import JobSpec, ModelSpec
from tests.engine_cases import Case, alone, check, engine_for, request_of
from tests.families import KINDS, rename_as_on_the_hub, saved_kind
from tests.lines import unfolded
from tests.models import noise_image, questions
from tests.shards import saved
from tests.test_engine_alone import samples

CPU = torch.device("cpu")
SIZES = [(40, 32), (1, 50), (90, 2), (300, 70), (100, 90), (3, 3)]
"""Of images, width and height: taller and wider than any resolution that a tiny model knows."""


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(path=str(folder))


class Known:
    """A checkpoint as a job loads it, and what it says to each case alone."""

    def __init__(self, folder: Path) -> None:
        check_model(spec_of(folder))
        self.processor: Any = load_processor(spec_of(folder))
        self.model: Any = load_model(spec_of(folder), CPU)
        self.cases = [
            Case(noise_image(i, width=w, height=h), f"USER: <image>\n{text} ASSISTANT:", 3 + n % 6)
            for i, (w, h) in enumerate(SIZES)
            for n, text in enumerate(questions(1 + i % 3, seed=i))
        ]
        self.expected = [alone(self.model, self.processor, case) for case in self.cases]

    def requests(self) -> list[Request]:
        """All questions on an image in one."""
        by_image: dict[int, list[Case]] = {}
        for case in self.cases:
            by_image.setdefault(id(case.image), []).append(case)
        return [request_of(self.processor, *cases) for cases in by_image.values()]

    def check(self, kind: str, *, room: int) -> None:
        engine = engine_for(kind, copy.deepcopy(self.model), self.processor, room=room)
        answers = [each for outcomes in engine.submit(self.requests()) for each in outcomes]
        for answer, expected in zip(answers, self.expected, strict=True):
            check(answer, expected)


@functools.cache
def known_of(name: str) -> Known:
    return Known(saved_kind(name))


@pytest.fixture(params=KINDS)
def known(request: pytest.FixtureRequest) -> Known:
    return known_of(request.param)


def test_every_family_is_tried() -> None:
    assert {kind.family for kind in KINDS.values()} == set(FAMILIES)


@pytest.mark.parametrize("room", [8, 64])
def test_in_slots_each_answer_is_what_generate_gives_alone(known: Known, room: int) -> None:
    assert why_plain(known.model) is None
    known.check("slots", room=room)


@pytest.mark.parametrize("room", [1, 16])
def test_in_padded_batches_each_answer_is_what_generate_gives_alone(
    known: Known, room: int
) -> None:
    known.check("plain", room=room)


@pytest.mark.parametrize("name", KINDS)
def test_weights_under_the_names_of_the_hub_are_the_same_model(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_kind(name), tmp_path / "checkpoint")
    rename_as_on_the_hub(folder)
    ours, theirs = load_model(spec_of(folder), CPU), known_of(name).model
    weights = ours.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(each, weights[key]) for key, each in theirs.state_dict().items())
    assert not load_file(folder / "model.safetensors").keys() & weights.keys()


def test_image_tokens_are_counted_as_the_processor_writes_them(known: Known) -> None:
    counted = ImageTokens(known.processor)
    sides = [1, 2, 5, 31, 33, 64, 97, 200, 1000]
    for width in sides:
        for height in sides:
            output = known.processor(text="<image>", images=Image.new("RGB", (width, height)))
            written = output["input_ids"][0].count(known.processor.image_token_id)
            assert counted.of((width, height)) == written, (width, height)


def test_image_tokens_that_do_not_match_the_features_fail_alone(known: Known) -> None:
    good = known.requests()[0]
    ids, token = list(good.prefix.token_ids), known.processor.image_token_id
    bad = Request(Prefix(ids[:-2], good.prefix.images), good.branches)
    for kind in ("slots", "plain"):
        engine = engine_for(kind, known.model, known.processor, room=64)
        [[outcome], [fine]] = engine.submit([bad, good])
        assert isinstance(outcome, TokenFeatureMismatch)
        assert f"{ids.count(token) - 2} image tokens" in str(outcome)
        assert f"{ids.count(token)} features" in str(outcome)
        assert isinstance(fine, Answer)


# Through the CPU step and the accelerator step

ASKED = ("Describe the image.", "Which colour is it, and how many are there?")
CHOICES = ["yes", "no", "both of them"]
IMAGES = [noise_image(i, width=w, height=h) for i, (w, h) in enumerate(SIZES)]
TILED = [name for name, kind in KINDS.items() if FAMILIES[kind.family].has_tiles]


def job_of(name: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x"},
            "ask": [
                *({"id": f"q{n}", "prompt": text} for n, text in enumerate(ASKED)),
                {"id": "choice", "prompt": "Is it red?", "choices": CHOICES},
            ],
            "model": {"path": str(saved_kind(name))},
            "output": {"path": "y"},
            "generate": {"max_new_tokens": 7},
        }
    )


@pytest.fixture(scope="module", params=[*TILED, "VipLLaVA, CLIP, Llama"])
def through(request: pytest.FixtureRequest) -> tuple[Known, pa.Table, list[dict[str, Any]]]:
    """A model, the prepared rows, and the answers; the first image is broken."""
    job = job_of(request.param)
    prepared = Encode(job, {})(samples(b"broken", *(saved(image, "PNG") for image in IMAGES)))
    answers = Generate(job, {}, run_id="r")(prepared).to_pylist()
    return known_of(request.param), prepared, answers


def test_a_job_answers_what_generate_gives_alone(through: Any) -> None:
    known, prepared, answers = through
    by_id = {(a["source_index"], a["question_id"]): a for a in answers}
    for row in unfolded(prepared)[1:]:
        image = IMAGES[row["source_index"] - 1]
        for prompt in row["prompts"]:
            inputs = known.processor(text=prompt["prompt"], images=image, return_tensors="pt")
            assert prompt["token_ids"] == inputs["input_ids"][0].tolist()
            answer = by_id[row["source_index"], prompt["question_id"]]
            assert answer["status"] == "ok", answer
            if prompt["question_id"] == "choice":
                continue
            whole = known.model.generate(**inputs, max_new_tokens=7, do_sample=False)
            said = whole[0, inputs["input_ids"].shape[1] :]
            text = known.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
            assert (answer["answer"], answer["output_tokens"]) == (text, len(said))


def test_choices_have_the_probabilities_that_the_model_gives_them_alone(through: Any) -> None:
    known, _, answers = through
    chosen = [a for a in answers if a["question_id"] == "choice"][1:]
    for image, answer in zip(IMAGES, chosen, strict=True):
        logprobs = []
        for text in CHOICES:
            prompt = f"USER: <image>\nIs it red? ASSISTANT: {text}</s>"
            inputs = known.processor(text=prompt, images=image, return_tensors="pt")
            given = len(known.processor.tokenizer(f" {text}</s>", add_special_tokens=False)[0])
            with torch.inference_mode():
                logits = known.model(**inputs).logits[0, -given - 1 : -1].log_softmax(-1)
            ids = inputs["input_ids"][0, -given:, None]
            logprobs.append(logits.gather(-1, ids).sum())
        wanted = torch.stack(logprobs).softmax(-1).tolist()
        found = [each["prob"] for each in answer["choice_probs"]]
        assert found == pytest.approx(wanted, abs=1e-4)


def test_an_image_that_cannot_be_decoded_fails_its_questions(through: Any) -> None:
    answers = through[2]
    assert [a["error_class"] for a in answers[:3]] == ["ImageUnidentified"] * 3


def test_pixels_travel_as_bytes_and_become_the_processors_bit_for_bit(through: Any) -> None:
    known, prepared, _ = through
    table = torch.from_numpy(pixel_table(known.processor))
    for row, image in zip(prepared.to_pylist()[1:], IMAGES, strict=True):
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["pixels_shape"])
        whole = known.processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        assert torch.equal(normalised(torch.from_numpy(pixels.copy()), table), whole[0].float())


@pytest.mark.parametrize("name", TILED)
def test_images_are_cut_into_tiles_without_transformers(name: str) -> None:
    assert isinstance(resize_of(known_of(name).processor), Tiles)


def test_a_processor_that_cuts_otherwise_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(saved_kind(TILED[0]), tmp_path / "checkpoint")
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "image_grid_pinpoints": [[32, 64]]}
    path.write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"image_grid_pinpoints is .* but \[\[32, 64\]\]"):
        load_processor(spec_of(folder))
