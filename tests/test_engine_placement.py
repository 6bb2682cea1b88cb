"""Models whose parts lie on several devices. Here these are the CPU and the disk: what lies on the
disk is only there while the hooks bring it, as on another GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.plan import plan
from pipeline.engine.check import check_model
from pipeline.engine.choose import engine_of, why_plain
from pipeline.engine.load import load_model, load_processor
from pipeline.engine.pixels import pixel_table
from pipeline.engine.placement import home_of, is_spread
from pipeline.engine.plain import PlainEngine
from pipeline.engine.request import Branch, Request
from schemas.errors import SpecError
from schemas.job import ModelSpec
from tests.engine_cases import EOS, alone, cases_of, check, engine_for, request_of
from tests.models import noise_image, shared_checkpoint, tiny_model
from tests.whole_jobs import job_of

CPU = torch.device("cpu")
TEXT = "model.language_model"
SPLITS = {
    "the last layers on disk": {
        f"{TEXT}.layers.1": "disk",
        f"{TEXT}.norm": "disk",
        "lm_head": "disk",
    },
    "the first parts on disk": {"model.vision_tower": "disk", f"{TEXT}.embed_tokens": "disk"},
    "the projector on disk": {"model.multi_modal_projector": "disk", f"{TEXT}.layers.0": "disk"},
}
PARTS = [
    "model.vision_tower",
    "model.multi_modal_projector",
    *(f"{TEXT}.{part}" for part in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")),
    "lm_head",
]


def spread(on_disk: dict[str, str]) -> tuple[Any, ModelSpec]:
    device_map = {part: on_disk.get(part, "cpu") for part in PARTS}
    spec = ModelSpec.model_validate(
        {"path": str(shared_checkpoint()), "device": "cpu", "device_map": device_map}
    )
    check_model(spec)
    return load_model(spec, CPU), spec


@pytest.mark.parametrize("split", SPLITS)
def test_a_spread_model_answers_as_the_whole_one_alone(split: str) -> None:
    model, spec = spread(SPLITS[split])
    assert any(weight.device.type == "meta" for weight in model.parameters())
    assert is_spread(model)
    assert home_of(model) == CPU
    processor = load_processor(spec)
    table = pixel_table(processor)
    engine = engine_of(model, eos_token_ids=EOS, table=table)
    assert isinstance(engine, PlainEngine)
    cases = cases_of(3, 2)
    outcomes = engine.submit([request_of(processor, case) for case in cases])
    whole = tiny_model()
    for [answer], case in zip(outcomes, cases, strict=True):
        check(answer, alone(whole, processor, case))


def test_given_answers_are_scored_by_a_spread_model() -> None:
    model, spec = spread(SPLITS["the last layers on disk"])
    processor = load_processor(spec)
    request = request_of(processor, cases_of(1, 1)[0])
    [branch] = request.branches
    scored = Request(request.prefix, [Branch([*branch.token_ids, 7, 9], 1, scored=2)])
    [[one]], [[other]] = (
        engine_for("plain", each, processor).submit([scored]) for each in (model, tiny_model())
    )
    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_the_reason_for_the_plain_engine_is_told() -> None:
    model, _ = spread(SPLITS["the projector on disk"])
    assert why_plain(model) == "its parts lie on several devices (model.device_map)"


def test_a_model_that_is_not_spread_keeps_its_slots() -> None:
    model, _ = spread({})
    assert not is_spread(model)
    assert why_plain(model) is None
    assert home_of(tiny_model()) == CPU


def test_an_actor_of_several_gpus_has_the_model_spread(tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "one.png")

    def planned(gpus: float, **model: Any) -> ModelSpec:
        job = job_of(
            "",
            tmp_path / "out",
            source={"format": "images", "path": str(tmp_path / "one.png")},
            ask=[{"id": "what", "prompt": "What is this?"}],
            model={"path": str(shared_checkpoint()), **model},
            resources={"generate": {"gpus": gpus}},
        )
        return plan(job).job.model

    assert planned(2).device_map == "auto"
    assert planned(2, device_map="sequential").device_map == "sequential"
    assert planned(2, quantization="8bit").device_map is None
    assert planned(2, device="cpu").device_map is None
    assert planned(1).device_map is None


def test_a_spread_and_quantized_model_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"does not go with model\.quantization 8bit"):
        ModelSpec(device_map="auto", quantization="8bit")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"accelerate is not installed: pip install"):
        check_model(ModelSpec(device_map="auto"))
