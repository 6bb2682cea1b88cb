"""Models of no family: the same job, through their own `generate`, one prompt at a time."""

import copy
import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.encode import Encode
from pipeline.engine.alone import AloneEngine
from pipeline.engine.check import check_model
from pipeline.engine.load import load_model, load_processor
from pipeline.engine.request import Answer, Branch, ImagePixels, Outcome, Prefix, Request
from pipeline.engine.wholeprocessor import WholeProcessor
from pipeline.generate import Generate
from schemas.errors import SpecError
from schemas.job import JobSpec
from tests.families import SLOW, saved_slow
from tests.lines import sample_table, unfolded
from tests.models import noise_image
from tests.shards import saved

pytestmark = pytest.mark.filterwarnings(
    # Of PaliGemma's processor, with tensors.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
ASKED = ("Describe the image.", "Which colour is it, and how many are there?")
CHOICES = ["yes", "no", "both of them"]
IMAGES = [
    noise_image(i, width=w, height=h) for i, (w, h) in enumerate([(40, 32), (1, 50), (90, 7)])
]
DRAWN = {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "seed": 3}


def job_of(name: str, **generate: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x"},
            "ask": [
                *({"id": f"q{n}", "prompt": text} for n, text in enumerate(ASKED)),
                {"id": "choice", "prompt": "Is it red?", "choices": CHOICES},
            ],
            "model": {"path": str(saved_slow(name))},
            "output": {"path": "y"},
            "generate": {"max_new_tokens": 7, **generate},
        }
    )


def samples(*images: bytes) -> pa.Table:
    return sample_table(
        {
            "source_uri": "a.tar",
            "source_index": index,
            "shard_identity": "etag",
            "sample_id": f"s{index}",
            "units": ["q0", "q1", "choice"],
            "image": image,
        }
        for index, image in enumerate(images)
    )


Answers = dict[tuple[int, str], dict[str, Any]]


class Known:
    def __init__(self, name: str) -> None:
        job = job_of(name)
        check_model(job.model)
        self.name = name
        self.processor: Any = load_processor(job.model)
        self.model: Any = load_model(job.model, torch.device("cpu"))
        images = [saved(image, "PNG") for image in IMAGES]
        self.prepared = Encode(job, {})(samples(*images, b"broken"))
        self.answers = self.answered()

    def answered(self, **generate: Any) -> Answers:
        rows = Generate(job_of(self.name, **generate), {}, run_id="r")(self.prepared).to_pylist()
        return {(row["source_index"], row["question_id"]): row for row in rows}

    def prompts(self) -> Any:
        for row in unfolded(self.prepared)[: len(IMAGES)]:
            for prompt in row["prompts"]:
                yield row["source_index"], prompt


@functools.cache
def known_of(name: str) -> Known:
    return Known(name)


@pytest.fixture(params=SLOW)
def known(request: pytest.FixtureRequest) -> Known:
    return known_of(request.param)


def test_answers_are_what_generate_says_alone(known: Known) -> None:
    for index, prompt in known.prompts():
        answer = known.answers[index, prompt["question_id"]]
        assert answer["status"] == "ok", answer
        inputs = known.processor(text=prompt["prompt"], images=IMAGES[index], return_tensors="pt")
        inputs.pop("labels", None)
        assert prompt["token_ids"] == inputs["input_ids"][0].tolist()
        if prompt["question_id"] != "choice":
            out = known.model.generate(
                **inputs,
                max_new_tokens=7,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            said = out.sequences[0, inputs["input_ids"].shape[1] :]
            text = known.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
            assert (answer["answer"], answer["output_tokens"]) == (text, len(said))
            logprobs = torch.cat(out.logits).log_softmax(-1).gather(-1, said[:, None])
            assert answer["mean_logprob"] == pytest.approx(logprobs.mean().item(), abs=1e-4)


def test_choices_are_scored_as_if_the_model_had_said_them(known: Known) -> None:
    for index, prompt in known.prompts():
        if prompt["question_id"] != "choice":
            continue
        inputs = known.processor(text=prompt["prompt"], images=IMAGES[index], return_tensors="pt")
        inputs.pop("labels", None)
        shared, scores = prompt["choices"]["shared_tokens"], []
        beside = {k: v for k, v in inputs.items() if v.shape == inputs["input_ids"].shape}
        for given in prompt["choices"]["token_ids"]:
            cut = {**inputs, **{k: v[:, :shared] for k, v in beside.items()}}
            scores.append(_said_logprob(known.model, cut, [*given, 2]))
        found = [each["prob"] for each in known.answers[index, "choice"]["choice_probs"]]
        assert found == pytest.approx(torch.stack(scores).softmax(-1).tolist(), abs=1e-4)


def _said_logprob(model: Any, inputs: dict[str, Any], said: list[int]) -> torch.Tensor:
    """Step by step over the model's own cache."""

    def force(batch: int, ids: torch.Tensor) -> list[int]:
        return [said[len(ids) - inputs["input_ids"].shape[1]]]

    out = model.generate(
        **inputs,
        max_new_tokens=len(said),
        do_sample=False,
        prefix_allowed_tokens_fn=force,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logprobs = torch.cat(out.logits).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(said)[:, None]).sum()


def test_what_is_drawn_is_the_same_every_time_and_not_the_likeliest(known: Known) -> None:
    drawn, again = known.answered(**DRAWN), known.answered(**DRAWN)
    told = _told(drawn)
    assert told == _told(again)
    likeliest = _told(known.answers)
    assert all(told[key] != likeliest[key] for key in told if key[1] != "choice")


def _told(answers: Answers) -> dict[tuple[int, str], tuple[str, float]]:
    return {k: (a["answer"], a["mean_logprob"]) for k, a in answers.items() if a["status"] == "ok"}


def test_what_follows_an_answer_is_asked_too(known: Known) -> None:
    """As the turns of a talk would be: each goes on from all that was said before."""
    whole, image = WholeProcessor(known.processor), IMAGES[0]
    first = tuple(whole.ids(f"{known.processor.image_token}\nWhat?", image))
    asked: list[Branch] = [Branch(first, 4), Branch(first, 3)]

    def grow(number: int, outcome: Outcome) -> list[Branch]:
        assert isinstance(outcome, Answer)
        if number:
            return []
        ids = (*first, *outcome.token_ids, *first[-3:])
        asked.append(Branch(ids, 4, continues=0))
        return asked[-1:]

    pixels = np.frombuffer(whole.of_image(image), np.uint8)
    prefix = Prefix((), [ImagePixels(pixels, "", image.size)])
    model = copy.deepcopy(known.model)
    engine = AloneEngine(model, processor=known.processor, eos_token_ids=())
    [grown] = engine.submit([Request(prefix, asked[:2], grow)])
    [apart] = engine.submit([Request(prefix, asked)])
    assert len(grown) == 3
    assert grown == apart


def test_an_image_that_cannot_be_decoded_fails_its_questions(known: Known) -> None:
    for unit in ("q0", "q1", "choice"):
        assert known.answers[len(IMAGES), unit]["error_class"] == "ImageUnidentified"


def test_decoding_at_a_fraction_is_refused() -> None:
    job = job_of("Idefics3")
    fast = job.model_copy(update={"source": job.source.model_copy(update={"decode": "fast"})})
    with pytest.raises(SpecError, match=r"set source.decode to exact"):
        Encode(fast, {})
