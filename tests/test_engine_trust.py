"""What of a checkpoint could run code is not opened, and what is opened runs none."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine.check import check_model
from pipeline.engine.load import load_config, load_model, load_processor
from pipeline.fingerprint import model_fingerprint
from schemas.errors import SpecError
from schemas.job import ModelSpec
from tests.models import shared_checkpoint, tiny_model, write_checkpoint
from tests.test_engine_repair import edit
from tests.test_engine_stored import write_weights
from tests.whole_jobs import job_of

CPU = torch.device("cpu")
CODE = """
import pathlib
from transformers import LlavaForConditionalGeneration

pathlib.Path({mark!r}).touch()

class Own(LlavaForConditionalGeneration):
    is_the_authors_own = True
"""


def spec(folder: Path, **keys: Any) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(folder), "device": "cpu", **keys})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(shared_checkpoint(), tmp_path / "checkpoint")


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(SpecError) as caught:
        check_model(spec(folder, **keys))
    return str(caught.value)


# Pickles


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickles_are_refused_with_both_remedies(pickled: Path) -> None:
    told = refusal(pickled)
    assert "pickles (pytorch_model.bin), which can run code" in told
    assert "`save_pretrained`, or set model.allow_pickle: true" in told


def test_pickles_that_are_allowed_give_the_model(pickled: Path) -> None:
    allowed = spec(pickled, allow_pickle=True)
    check_model(allowed)
    loaded = load_model(allowed, CPU).state_dict()
    assert all(torch.equal(w, loaded[name]) for name, w in tiny_model().state_dict().items())
    weights = model_fingerprint(job_of("x", "y", model=allowed))["weights"]
    (pickled / "pytorch_model.bin").write_bytes(b"other")
    assert model_fingerprint(job_of("x", "y", model=allowed))["weights"] != weights


def test_pickles_beside_safetensors_are_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    check_model(spec(folder))
    for allow in (False, True):
        load_model(spec(folder, allow_pickle=allow), CPU)


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["of old", "zip"])
def test_a_pickle_that_would_run_code_does_not(pickled: Path, tmp_path: Path, form: str) -> None:
    path, mark = pickled / "pytorch_model.bin", tmp_path / "mark"
    if form == "zip":
        torch.save({"x": Harmful(mark)}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps({"x": Harmful(mark)}, protocol=2))
    with pytest.raises(SpecError, match="cannot be loaded"):
        load_model(spec(pickled, allow_pickle=True), CPU)
    assert not mark.exists()


def test_a_pickle_that_is_cut_off_is_a_fault_of_the_spec(pickled: Path) -> None:
    path = pickled / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SpecError, match="cannot be loaded"):
        load_model(spec(pickled, allow_pickle=True), CPU)


def test_a_missing_shard_of_pickles(pickled: Path) -> None:
    (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-00001-of-00002.bin")
    weights = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (pickled / "pytorch_model.bin.index.json").write_text("{}")
    edit(pickled / "pytorch_model.bin.index.json", weight_map=weights)
    told = refusal(pickled, allow_pickle=True)
    assert "pytorch_model.bin.index.json names pytorch_model-00002-of-00002.bin, missing" in told


def test_pickles_do_not_tell_their_dtype(pickled: Path) -> None:
    edit(pickled / "config.json", dtype=None)
    for part in ("text_config", "vision_config"):
        config = tiny_model().config.to_dict()[part]
        edit(pickled / "config.json", **{part: {**config, "dtype": None}})
    with pytest.raises(SpecError, match=r"set model\.dtype"):
        load_model(spec(pickled, allow_pickle=True), CPU)
    load_model(spec(pickled, allow_pickle=True, dtype="float32"), CPU)


# Code


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there once the checkpoint's code has run."""
    return tmp_path / "ran"


@pytest.fixture
def coded(folder: Path, mark: Path) -> Path:
    (folder / "own_model.py").write_text(CODE.format(mark=str(mark)))
    edit(folder / "config.json", auto_map={"AutoModelForImageTextToText": "own_model.Own"})
    # transformers knows the names of older versions for its own classes only.
    write_weights(folder, dict(tiny_model().state_dict()))
    return folder


def test_code_of_a_checkpoint_is_refused_with_both_remedies(coded: Path, mark: Path) -> None:
    told = refusal(coded)
    assert "config.json names code of its own (auto_map: own_model.Own)" in told
    assert "set model.trust_remote_code: true, or take auto_map out" in told
    load_config(spec(coded))
    load_processor(spec(coded))
    assert type(load_model(spec(coded), CPU)).__name__ == "LlavaForConditionalGeneration"
    assert not mark.exists()


def test_code_that_is_trusted_runs(
    coded: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    trusted = spec(coded, trust_remote_code=True)
    check_model(trusted)
    assert load_config(trusted).text_config.vocab_size == 256
    assert load_processor(trusted).image_token == "<image>"
    model: Any = load_model(trusted, CPU)
    assert model.is_the_authors_own
    assert mark.exists()
    loaded = model.state_dict()
    assert all(torch.equal(w, loaded[name]) for name, w in tiny_model().state_dict().items())


@pytest.mark.parametrize(
    ("name", "auto_map"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Tokenizer"]}),
        ("processor_config.json", {"AutoProcessor": "own.Processor"}),
    ],
)
def test_code_of_tokenizers_and_processors_too(
    folder: Path, name: str, auto_map: dict[str, Any]
) -> None:
    edit(folder / name, auto_map=auto_map)
    assert f"{name} names code of its own (auto_map: own." in refusal(folder)


def test_code_of_another_repository_is_refused_always(coded: Path) -> None:
    edit(coded / "config.json", auto_map={"AutoConfig": "somebody/else--own.Config"})
    assert "code of another repository" in refusal(coded, trust_remote_code=True)


def test_code_that_is_trusted_decides_answers(coded: Path) -> None:
    def of(**keys: Any) -> dict[str, str]:
        return model_fingerprint(job_of("x", "y", model=spec(coded, **keys)))

    plain, trusted = of(), of(trust_remote_code=True)
    assert trusted.keys() - plain.keys() == {"code"}
    (coded / "own_model.py").write_text("# other")
    assert of() == plain
    assert of(trust_remote_code=True)["code"] != trusted["code"]
    assert of(allow_pickle=True) == plain
