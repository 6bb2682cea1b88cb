"""Processors that say wrongly how many places an image takes: set right where that is certain."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, SiglipVisionConfig

from jobs.plan import plan
from pipeline.engine.load import load_model, load_processor, processor_repairs
from pipeline.engine.repair import UNSAID, repairs
from pipeline.fingerprint import model_fingerprint
from schemas.errors import SpecError
from schemas.job import ModelSpec
from tests.engine_cases import Case, alone, check, engine_for, request_of
from tests.families import KINDS, saved_kind
from tests.models import (
    PATCH,
    SIDE,
    noise_image,
    shared_checkpoint,
    tiny_model,
    tiny_processor,
    write_checkpoint,
)
from tests.whole_jobs import job_of

FILE = "processor_config.json"
LOGGER = "pipeline.engine.load"
"""Other tests may have left the root of all loggers at any level."""
PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"
RIGHT = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
BROKEN: list[dict[str, Any]] = [
    {"patch_size": None},
    {"patch_size": 4},
    {"num_additional_image_tokens": None},
    {"num_additional_image_tokens": 0},
    {"vision_feature_select_strategy": None},
    {"vision_feature_select_strategy": "full"},
    dict.fromkeys(RIGHT),
]


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    whole = {**json.loads(path.read_text()), **changes}
    text = json.dumps({k: v for k, v in whole.items() if v is not None}, indent=2, sort_keys=True)
    path.write_text(text + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(shared_checkpoint(), tmp_path / "checkpoint")


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(path=str(folder), device="cpu")


@pytest.mark.parametrize("changes", BROKEN)
def test_a_processor_of_old_is_set_right_and_that_is_said(
    folder: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / FILE, **changes)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        processor = load_processor(spec(folder))
    assert {key: getattr(processor, key) for key in RIGHT} == RIGHT
    ids = [
        p(text=PROMPT, images=noise_image(0))["input_ids"] for p in (processor, tiny_processor())
    ]
    assert ids[0] == ids[1]
    assert len(caplog.messages) == len(changes)
    for (key, value), said in zip(changes.items(), caplog.messages, strict=True):
        assert said.startswith(f"model {folder}: processor_config.json: {key} ")
        assert repr(RIGHT[key]) in said
        assert value is None or f"is {value!r}; " in said


def test_a_processor_that_is_right_is_left_alone(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_processor(spec(folder))
    assert not caplog.messages


def test_keys_that_make_up_for_each_other_are_left_alone(folder: Path) -> None:
    edit(folder / FILE, num_additional_image_tokens=0, vision_feature_select_strategy="full")
    assert processor_repairs(spec(folder)) == []


@pytest.mark.parametrize("kind", ["slots", "plain"])
def test_what_is_set_right_is_answered_as_the_model_alone_does(folder: Path, kind: str) -> None:
    edit(folder / FILE, **dict.fromkeys(RIGHT))
    processor, model = load_processor(spec(folder)), load_model(spec(folder), torch.device("cpu"))
    case = Case(noise_image(1), PROMPT, 8)
    engine = engine_for(kind, model, processor)
    [[answer]] = engine.submit([request_of(processor, case)])
    check(answer, alone(tiny_model(), tiny_processor(), case))


def siglip(**keys: Any) -> LlavaForConditionalGeneration:
    """A model whose tower has no class token."""
    config = tiny_model().config
    config.vision_config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    for key, value in keys.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_a_tower_without_class_token_is_known(tmp_path: Path, strategy: str) -> None:
    write_checkpoint(tmp_path, model=siglip(vision_feature_select_strategy=strategy))
    edit(tmp_path / FILE, **dict.fromkeys(RIGHT))
    processor = load_processor(spec(tmp_path))
    assert processor.num_additional_image_tokens == 0
    assert processor.vision_feature_select_strategy == strategy
    model = load_model(spec(tmp_path), torch.device("cpu"))
    inputs = processor(text=PROMPT, images=noise_image(0), return_tensors="pt")
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert (inputs["input_ids"] == processor.image_token_id).sum() == len(features[0])


def test_what_a_tower_of_another_kind_puts_before_its_patches_is_not_guessed() -> None:
    config = {
        "model_type": "llava",
        "vision_config": {"model_type": "dinov2", "patch_size": 14},
        "vision_feature_select_strategy": "default",
    }
    assert repairs({"patch_size": 14, "vision_feature_select_strategy": "full"}, config) == []
    assert [r.key for r in repairs({}, config)] == ["patch_size"]


def test_a_patch_size_that_nobody_tells_is_an_error(folder: Path) -> None:
    edit(folder / FILE, patch_size=None)
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config={**config["vision_config"], "patch_size": 0})
    with pytest.raises(SpecError, match="patch_size"):
        load_processor(spec(folder))


def fingerprint(folder: Path) -> dict[str, str]:
    return model_fingerprint(job_of("x", "y", model={"path": str(folder)}))


@pytest.mark.parametrize("changes", BROKEN)
def test_a_table_goes_on_when_the_file_is_set_right_by_hand(
    folder: Path, changes: dict[str, Any]
) -> None:
    before = fingerprint(folder)
    edit(folder / FILE, **changes)
    assert fingerprint(folder) == before


def test_another_setting_beside_a_repair_is_another_processor(folder: Path) -> None:
    edit(folder / FILE, patch_size=None)
    before = fingerprint(folder)
    edit(folder / FILE, image_token="<picture>")
    assert fingerprint(folder)["processor"] != before["processor"]


def test_a_run_says_what_is_set_right_before_it_begins(folder: Path) -> None:
    edit(folder / FILE, num_additional_image_tokens=None)
    image = noise_image(0)
    image.save(folder.parent / "one.png")
    source = {"format": "images", "path": str(folder.parent / "one.png")}
    ask = [{"id": "what", "prompt": "What is this?"}]
    out = str(folder.parent / "out")
    job = job_of("", out, source=source, ask=ask, model={"path": str(folder)})
    [note] = plan(job).notes
    assert "num_additional_image_tokens is missing; 1 is used" in note


@pytest.mark.parametrize("name", KINDS)
def test_each_familys_processor_is_set_right(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(saved_kind(name), tmp_path / "checkpoint")
    whole = load_processor(spec(folder))
    prints = fingerprint(folder)
    stored = json.loads((folder / FILE).read_text())
    edit(folder / FILE, **{key: None for key in UNSAID if key in stored})
    processor = load_processor(spec(folder))
    assert fingerprint(folder) == prints
    for size in ((40, 32), (90, 31)):
        image = noise_image(1, width=size[0], height=size[1])
        ids = [each(text=PROMPT, images=image)["input_ids"] for each in (processor, whole)]
        assert ids[0] == ids[1]


def test_the_earliest_checkpoints_have_no_such_file_at_all(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_processor().image_processor.save_pretrained(folder)
    (folder / FILE).unlink()
    assert (folder / "preprocessor_config.json").exists()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        processor = load_processor(spec(folder))
    assert {key: getattr(processor, key) for key in RIGHT} == RIGHT
    assert len(caplog.messages) == len(RIGHT)
    ids = [
        p(text=PROMPT, images=noise_image(0))["input_ids"] for p in (processor, tiny_processor())
    ]
    assert ids[0] == ids[1]
    assert fingerprint(folder)["processor"]
