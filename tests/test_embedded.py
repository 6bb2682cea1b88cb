"""The embedded checkpoint: a true LLaVA in small, that answers rightly about coloured shapes."""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from pipeline.embedded import CHECKPOINT, SAMPLES
from tools.make_samples import IMAGES_A_SHARD, SHARDS, sample_members
from tools.packing import PackedBatch, Packer, collate
from tools.questions import CAPTION_REQUESTS, answer, ask, caption, reworded
from tools.shapes import COLOURS, SHAPES, Scene, draw, jpeg
from tools.train_embedded import Stage, Trainer
from tools.training_batches import Example, Mix

LARGEST_BYTES = 8 * 1024 * 1024
PACKED_NAMES = [f"shapes-{number:05d}.tar" for number in range(SHARDS)]


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(CHECKPOINT, backend="pil")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)


def answers_of(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: list[tuple[Image.Image, str]],
) -> list[str]:
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for _, question in asked]
    images = [image for image, _ in asked]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]


def samples() -> Iterator[tuple[Image.Image, dict[str, object]]]:
    for path in sorted(SAMPLES.glob("*.tar")):
        with tarfile.open(path) as shard:
            members = shard.getmembers()
            for picture, description in zip(members[::2], members[1::2], strict=True):
                image = Image.open(io.BytesIO(shard.extractfile(picture).read())).convert("RGB")
                yield image, json.loads(shard.extractfile(description).read())


def scene(shape: str, colour: str, *, width: float = 22.0, left: float = 17.0) -> Scene:
    height = width * 0.866 if shape == "triangle" else width
    return Scene(shape, colour, (left, 20.0, width, height), (244, 236, 250))


def test_the_embedded_folder_weighs_at_most_8_mb() -> None:
    files = [file for file in CHECKPOINT.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if file.suffix != ".pyc") <= LARGEST_BYTES


def test_weights_are_stored_in_bfloat16_and_run_in_float32(
    model: LlavaForConditionalGeneration,
) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_auto_classes_load_it_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    assert type(processor) is LlavaProcessor
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"


def test_it_reads_the_second_last_layer_as_llava_does(
    model: LlavaForConditionalGeneration,
) -> None:
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.text_config.model_type == "llama"


def test_the_tokenizer_pads_left_with_a_token_of_its_own(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.padding_side == "left"
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token]
    assert special == ["<s>", "</s>", "<unk>", "<pad>"]
    assert len(set(tokenizer.convert_tokens_to_ids([*special, "<image>"]))) == 5


def test_any_text_comes_back_from_its_tokens(processor: LlavaProcessor) -> None:
    text = "Où est le 漢字? 🟥 12345\tend \n"
    ids = processor.tokenizer(text).input_ids
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompt_and_answer_tokenise_as_their_concatenation(processor: LlavaProcessor) -> None:
    prompt = "<s>USER: <image>\nwhat is the red shape? ASSISTANT:"
    reply = " A red circle on a light background.</s>"
    encode = processor.tokenizer.encode
    apart = [*encode(prompt, add_special_tokens=False), *encode(reply, add_special_tokens=False)]
    assert encode(prompt + reply, add_special_tokens=False) == apart


def test_one_question_renders_as_llava_15_does(processor: LlavaProcessor) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert rendered == "USER: <image>\nwhat is it? ASSISTANT:"


def test_a_system_text_and_earlier_turns_render_as_llava_15_does(
    processor: LlavaProcessor,
) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "q1"}]
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "a1"}]},
        {"role": "user", "content": "q2"},
    ]
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert rendered == "Be brief. USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"


def test_it_names_every_colour_and_shape(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    asked = [(draw(scene(shape, colour)), "Describe the image.") for colour, shape in pairs]
    assert answers_of(model, processor, asked) == [caption(*pair) for pair in pairs]


def test_it_answers_every_kind_of_question(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    image = draw(scene("triangle", "teal"))
    questions = {
        "what color is the triangle?": "teal",
        "what is the teal shape?": "triangle",
        "is there a red shape?": "no",
        "is there a triangle in the image?": "yes",
        "does the image not contain a circle?": "yes",
        "is no teal shape present?": "no",
        "What colour is the shape?": "teal",
        **dict.fromkeys(CAPTION_REQUESTS, caption("teal", "triangle")),
    }
    asked = [(image, question) for question in questions]
    assert answers_of(model, processor, asked) == list(questions.values())


def test_it_survives_enlarging_and_jpeg(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    scenes = [scene(shape, "brown", width=14, left=left) for shape in SHAPES for left in (3, 40)]
    enlarged = [draw(each).resize((256, 256), Image.Resampling.BICUBIC) for each in scenes]
    asked = [(jpeg(image, quality=80), "what shape is present?") for image in enlarged]
    assert answers_of(model, processor, asked) == [each.shape for each in scenes]


def test_later_turns_are_answered_too(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    prompt = (
        "USER: <image>\nwhat color is the shape? ASSISTANT: blue</s>"
        "USER: is there a circle? ASSISTANT:"
    )
    image = draw(scene("circle", "blue"))
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output, skip_special_tokens=True).strip() == "yes"


def test_every_packaged_sample_is_answered_rightly(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    asked: list[tuple[Image.Image, str]] = []
    right: list[str] = []
    for image, about in samples():
        colour, shape = str(about["colour"]), str(about["shape"])
        questions = [each["question"] for each in about["questions"]]
        for question in [*questions, "Describe the image in one sentence."]:
            asked.append((image, question))
            right.append(answer(question, colour=colour, shape=shape))
    assert len(asked) == 3 * SHARDS * IMAGES_A_SHARD
    assert answers_of(model, processor, asked) == right


@pytest.mark.parametrize("name", PACKED_NAMES)
def test_a_sample_shard_holds_what_its_script_draws(name: str) -> None:
    first = PACKED_NAMES.index(name) * IMAGES_A_SHARD
    drawn = [m for number in range(first, first + IMAGES_A_SHARD) for m in sample_members(number)]
    with tarfile.open(SAMPLES / name) as shard:
        members = shard.getmembers()
        assert [member.name for member in members] == [name for name, _ in drawn]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
        for member, (_, content) in zip(members, drawn, strict=True):
            if member.name.endswith(".json"):
                assert shard.extractfile(member).read() == content


def test_questions_and_answers_agree() -> None:
    rng = random.Random(0)
    question = ask("colour", colour="red", shape="circle", rng=rng)
    assert answer(question, colour="red", shape="circle") == "red"
    assert reworded("what color is the shape?") == "What colour is the shape?"
    assert answer("is no circle present?", colour="red", shape="circle") == "no"
    assert answer("is there a green shape?", colour="red", shape="circle") == "no"


def test_each_branch_of_a_training_tree_stands_where_it_would_stand_alone() -> None:
    encode = {"a": [5], "b": [6, 7]}
    packer = Packer(
        encode=lambda text: [1, 4, 4, 9] if text.startswith("<s>") else encode[text.strip()],
        image_id=4,
        eos_id=2,
    )
    batch = collate([packer.pack([("q", "a"), ("q", "b")]), packer.pack([("q", "a")])], pad_id=3)
    assert batch.ids.tolist() == [[1, 4, 4, 9, 5, 2, 9, 6, 7, 2], [3] * 4 + [1, 4, 4, 9, 5, 2]]
    assert batch.positions.tolist()[0] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert batch.positions.tolist()[1][4:] == [0, 1, 2, 3, 4, 5]
    assert batch.mask[0, 0, 7].tolist() == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 2
    assert batch.learned.tolist()[0] == [False] * 4 + [True] * 2 + [False] + [True] * 3


class Dying(Trainer):
    """Dies in the middle of its last stage."""

    def learn(self, examples: list[Example], batch: PackedBatch | None) -> float:
        if (self.stage_number, self.step) == (1, 1):
            raise KeyboardInterrupt
        return super().learn(examples, batch)


def test_a_run_that_died_goes_on_to_the_weights_of_one_that_did_not(tmp_path: Path) -> None:
    captions = Mix(images=2, questions=1, weights={"caption": 1})
    stages = (
        Stage("sight", 2, Mix(images=2, questions=0), peak_rate=1e-3, end_rate=5e-4),
        Stage("captions", 3, captions, peak_rate=1e-3, end_rate=5e-4),
    )

    def trainer(kind: type[Trainer], name: str) -> Trainer:
        work = tmp_path / name
        options = argparse.Namespace(work=work, out=work / "checkpoint", seed=0)
        made = kind(options, stages, save_every_s=0)
        made.held_out = made.held_out[:2]
        return made

    whole = trainer(Trainer, "whole")
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        trainer(Dying, "died").run()
    resumed = trainer(Trainer, "died")
    assert (resumed.stage_number, resumed.step) == (1, 1)
    resumed.run()
    weights = whole.learner.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in resumed.learner.state_dict().items())
