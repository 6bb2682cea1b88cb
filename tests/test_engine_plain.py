"""The plain engine against transformers' `generate` on each prompt alone, unpadded."""

import itertools
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.engine.pixels import normalised, pixel_table, resized
from pipeline.engine.plain import PlainEngine
from pipeline.engine.request import Answer, Branch, Prefix, Request
from schemas.errors import (
    DeviceOutOfMemory,
    NonFiniteLogits,
    SpecError,
    TokenFeatureMismatch,
)
from tests.engine_cases import EOS, Case, alone, cases_of, check, request_of
from tests.models import noise_image, tiny_model, tiny_processor

N_IMAGES, N_QUESTIONS = 4, 3


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def cases():
    return cases_of(N_IMAGES, N_QUESTIONS)


def engine_of(model, processor, *, batch_size=16, eos=EOS):
    table = pixel_table(processor)
    return PlainEngine(model, eos_token_ids=eos, table=table, batch_size=batch_size)


@pytest.fixture(scope="module")
def expected(model, processor, cases):
    return [alone(model, processor, case) for case in cases]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_tokens_and_logprobs_equal_generate_on_each_prompt_alone(
    model, processor, cases, expected, batch_size
):
    order = list(range(len(cases)))
    random.Random(batch_size).shuffle(order)
    requests = [request_of(processor, cases[i]) for i in order]
    outcomes = engine_of(model, processor, batch_size=batch_size).submit(requests)
    for i, [answer] in zip(order, outcomes, strict=True):
        check(answer, expected[i])


def test_the_cases_tell_images_positions_and_endings_apart(expected):
    answers = {tuple(each.tokens) for each in expected}
    assert len(answers) == len(expected)
    assert {each.tokens[-1] in EOS for each in expected} == {True, False}


def test_questions_that_share_a_prefix_are_answered_in_their_order(
    model, processor, cases, expected
):
    groups = [list(range(i, len(cases), N_IMAGES)) for i in range(N_IMAGES)]
    requests = [request_of(processor, *(cases[i] for i in g)) for g in groups]
    outcomes = engine_of(model, processor, batch_size=5).submit(requests)
    for group, answers in zip(groups, outcomes, strict=True):
        for i, answer in zip(group, answers, strict=True):
            check(answer, expected[i])


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_an_answer_does_not_depend_on_what_else_is_in_the_call(
    model, processor, cases, expected, data
):
    chosen = data.draw(st.lists(st.integers(0, len(cases) - 1), min_size=1, max_size=8))
    batch_size = data.draw(st.integers(1, 8))
    requests = [request_of(processor, cases[i]) for i in chosen]
    outcomes = engine_of(model, processor, batch_size=batch_size).submit(requests)
    for i, [answer] in zip(chosen, outcomes, strict=True):
        check(answer, expected[i])


def test_calls_from_several_threads_do_not_mix(model, processor, cases, expected):
    engine = engine_of(model, processor, batch_size=4)
    results = {}

    def ask(i):
        results[i] = engine.submit([request_of(processor, cases[i])])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        check(results[i][0][0], expected[i])


def test_a_request_without_branches_and_an_empty_call_give_nothing(model, processor, cases):
    engine = engine_of(model, processor)
    assert engine.submit([]) == []
    request = request_of(processor, cases[0])
    assert engine.submit([Request(request.prefix, [])]) == [[]]


class Watched:
    """A model that counts the images it looks at, and whose memory holds `room` rows or images."""

    def __init__(self, model, *, room=None, error=None):
        self._model, self._room, self._error = model, room, error
        self.images_seen, self.batches, self.positions = 0, [], []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def get_image_features(self, pixel_values):
        self._allocate(len(pixel_values))
        self.images_seen += len(pixel_values)
        return self._model.get_image_features(pixel_values=pixel_values)

    def __call__(self, **inputs):
        self._allocate(len(inputs["inputs_embeds"]))
        self.batches.append(len(inputs["inputs_embeds"]))
        self.positions.append(inputs["position_ids"])
        return self._model(**inputs)

    def _allocate(self, n):
        if self._room is not None and n > self._room:
            raise self._error


CPU_OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")


def test_an_image_is_looked_at_once_however_many_questions_and_requests_name_it(
    model, processor, cases
):
    watched = Watched(model)
    requests = [request_of(processor, c) for c in cases]
    engine_of(watched, processor).submit(requests)
    assert watched.images_seen == N_IMAGES


def test_padding_moves_no_row_away_from_the_positions_it_has_alone(model, processor, cases):
    """RoPE sees distances only, so that tokens alone would not show a row that is moved."""
    watched = Watched(model)
    requests = [request_of(processor, c) for c in cases]
    engine_of(watched, processor).submit(requests)
    lengths = sorted(len(r.prefix.token_ids) + len(r.branches[0].token_ids) for r in requests)
    prefill, step = watched.positions[:2]
    assert sorted(prefill[:, -1].tolist()) == [length - 1 for length in lengths]
    assert prefill.min() == 0
    assert sorted(step[:, -1].tolist()) == lengths


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CPU_OUT_OF_MEMORY])
def test_a_batch_that_does_not_fit_is_halved_and_answers_stay_the_same(
    model, processor, cases, expected, error
):
    watched = Watched(model, room=3, error=error)
    requests = [request_of(processor, c) for c in cases]
    outcomes = engine_of(watched, processor).submit(requests)
    for [answer], one in zip(outcomes, expected, strict=True):
        check(answer, one)
    assert max(watched.batches) <= 3


def test_a_row_that_does_not_fit_alone_is_a_failed_row(model, processor, cases):
    watched = Watched(model, room=0, error=CPU_OUT_OF_MEMORY)
    requests = [request_of(processor, c) for c in cases[:3]]
    outcomes = engine_of(watched, processor).submit(requests)
    assert [type(o) for o in itertools.chain(*outcomes)] == [DeviceOutOfMemory] * 3


def test_an_error_that_is_not_about_memory_is_not_swallowed(model, processor, cases):
    watched = Watched(model, room=0, error=RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine_of(watched, processor).submit([request_of(processor, cases[0])])


def test_logits_that_are_not_finite_fail_their_row_only(processor, cases, expected):
    poisoned = tiny_model()
    guilty = processor(text=cases[0].prompt, images=cases[0].image)["input_ids"][0]
    others = [processor(text=c.prompt, images=c.image)["input_ids"][0] for c in cases[1:]]
    own = set(guilty) - set(itertools.chain(*others))
    own -= set(itertools.chain(*(each.tokens for each in expected)))
    assert own, "the first prompt needs a token that no other has"
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[min(own)] = float("nan")
    requests = [request_of(processor, case) for case in cases]
    first, *rest = engine_of(poisoned, processor).submit(requests)
    assert isinstance(first[0], NonFiniteLogits)
    for [answer], one in zip(rest, expected[1:], strict=True):
        check(answer, one)


@pytest.mark.parametrize(
    ("surplus", "remedy"),
    [(-1, "num_additional_image_tokens to 1"), (1, "vision_feature_select"), (-9, "patch_size")],
)
def test_image_tokens_that_do_not_match_the_features_are_a_failed_row(
    model, processor, cases, surplus, remedy
):
    good = request_of(processor, cases[0])
    ids = list(good.prefix.token_ids)
    ids = [*ids, ids[-1]] if surplus > 0 else ids[:surplus]
    bad = Request(Prefix(ids, good.prefix.images), good.branches)
    [[outcome], [fine]] = engine_of(model, processor).submit([bad, good])
    assert isinstance(outcome, TokenFeatureMismatch)
    assert f"{16 + surplus} image tokens" in str(outcome)
    assert "16 features" in str(outcome)
    assert remedy in str(outcome)
    assert isinstance(fine, Answer)


def test_a_prompt_without_an_image_is_answered(model, processor):
    ids = processor.tokenizer("USER: yes or no? ASSISTANT:")["input_ids"]
    request = Request(Prefix([]), [Branch(ids, 4)])
    [[answer]] = engine_of(model, processor).submit([request])
    whole = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=list(EOS)
    )
    assert list(answer.token_ids) == [t for t in whole[0, len(ids) :].tolist() if t not in EOS]


# Pixels


@pytest.mark.parametrize("size", [(40, 32), (31, 200), (500, 33), (32, 32), (1, 1)])
def test_pixels_through_the_table_are_the_processors_bit_for_bit(processor, size):
    image = noise_image(7, width=size[0], height=size[1])
    whole = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(resized(processor, image))[None]
    found = normalised(pixels, torch.from_numpy(pixel_table(processor)))
    assert found.dtype == whole.dtype == torch.float32
    assert torch.equal(found, whole)


@pytest.mark.parametrize("options", [{"do_normalize": False}, {"do_rescale": False}])
def test_a_processor_that_leaves_a_step_out_has_a_table_too(options):
    processor = tiny_processor()
    for name, value in options.items():
        setattr(processor.image_processor, name, value)
    image = noise_image(3)
    whole = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(resized(processor, image))[None]
    table = torch.from_numpy(pixel_table(processor))
    assert torch.equal(normalised(pixels, table), whole.float())


def test_a_processor_whose_images_differ_in_size_is_refused(processor):
    loose = tiny_processor()
    loose.image_processor.do_center_crop = False
    with pytest.raises(SpecError, match="different sizes"):
        pixel_table(loose)


def test_a_processor_that_looks_at_the_whole_image_is_refused():
    class Contrast:
        """Normalises by the image's own mean, as no table can."""

        def __call__(self, images, **options):
            pixels = np.moveaxis(np.asarray(images.resize((32, 32))), -1, 0)
            if options.get("do_rescale") is False:
                return {"pixel_values": [pixels]}
            return {"pixel_values": [(pixels - pixels.mean()).astype(np.float32)]}

    fake = type("Fake", (), {"image_processor": Contrast()})
    with pytest.raises(SpecError, match="Contrast"):
        pixel_table(fake)


def test_a_blank_and_a_noisy_image_give_other_answers(model, processor):
    prompt = "USER: <image>\nWhat is in this picture? ASSISTANT:"
    images = [Image.new("RGB", (32, 32)), noise_image(1)]
    requests = [request_of(processor, Case(image, prompt, 6)) for image in images]
    [[a], [b]] = engine_of(model, processor, eos=()).submit(requests)
    assert a.token_ids != b.token_ids
