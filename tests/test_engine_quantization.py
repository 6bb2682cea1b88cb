"""Weights of 8 and 4 bits: they load and answer in slots; what they need is asked for first."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from jobs.cli import main
from pipeline.engine.check import check_model
from pipeline.engine.choose import engine_of
from pipeline.engine.load import load_model, load_processor
from pipeline.engine.memory import weights_bytes
from pipeline.engine.pixels import pixel_table
from pipeline.engine.quantization import PACKAGES
from pipeline.engine.request import Answer
from pipeline.engine.slots import SlotsEngine
from schemas.errors import SpecError
from schemas.job import ModelSpec
from tests.engine_cases import EOS, cases_of, request_of
from tests.models import shared_checkpoint, tiny_model, write_checkpoint

CPU = torch.device("cpu")
CASES = cases_of(images=2, questions_each=5)


def spec(path: Any = None, **keys: Any) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(path or shared_checkpoint()), **keys})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_model_answers_in_slots_and_says_nothing(
    caplog: pytest.LogCaptureFixture, quantization: str, dtype: str
) -> None:
    model = load_model(spec(quantization=quantization, dtype=dtype), CPU)
    processor = load_processor(spec())
    engine = engine_of(model, eos_token_ids=EOS, table=pixel_table(processor))
    assert isinstance(engine, SlotsEngine)
    answered = engine.submit([request_of(processor, *CASES[n::2]) for n in range(2)])
    answers = [answer for answers in answered for answer in answers]
    assert len(answers) == len(CASES)
    assert all(isinstance(answer, Answer) for answer in answers)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("quantization", "layer"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")]
)
def test_the_text_models_layers_are_quantized_and_nothing_else(
    quantization: str, layer: str
) -> None:
    model = load_model(spec(quantization=quantization), CPU)
    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    quantized = {name for name, kind in kinds.items() if kind == layer}
    assert quantized == {name for name in kinds if name.startswith("model.language_model.")}
    assert {kinds[name] for name in kinds.keys() - quantized} == {"Linear"}
    assert not model.training


def test_fewer_bits_take_fewer_bytes() -> None:
    sizes = [
        weights_bytes(
            load_model(spec("embedded", dtype="bfloat16", quantization=quantization), CPU)
        )
        for quantization in ("none", "8bit", "4bit")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_a_layer_that_the_kernels_for_cpus_do_not_take_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, model=tiny_model(intermediate_size=72))
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.gate_proj is 72 x 64; on a CPU"):
        load_model(spec(tmp_path, quantization="4bit"), CPU)
    load_model(spec(tmp_path, quantization="8bit"), CPU)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_missing_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]  # as if not there
    with pytest.raises(SpecError, match=rf"{package} is not installed: pip install 'lavaflow\["):
        check_model(spec(quantization="8bit"))
    check_model(spec())


def test_a_job_without_the_package_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # type: ignore[arg-type]
    (tmp_path / "photo.jpg").touch()
    told = CliRunner().invoke(
        main,
        ["caption", str(tmp_path), "-o", str(tmp_path / "out"), "--set", "model.quantization=4bit"],
    )
    assert told.exit_code == 2
    assert "Error: model.quantization is 4bit, but bitsandbytes is not installed" in told.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_are_quantized_already_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(shared_checkpoint(), tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(SpecError, match=r"holds quantized weights .* awq"):
        check_model(spec(folder))
