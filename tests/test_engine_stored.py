"""Weights and tokens as checkpoints store them: every way gives the model that was saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken

from pipeline.engine.check import check_model
from pipeline.engine.checkpoint import open_checkpoint
from pipeline.engine.load import end_tokens, load_model, load_processor
from schemas.errors import SpecError
from schemas.job import ModelSpec
from tests.engine_cases import Case, alone, check, engine_for, request_of
from tests.models import noise_image, tiny_model, tiny_processor, write_checkpoint
from tests.test_engine_repair import edit

PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"
INDEX = "model.safetensors.index.json"


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(path=str(folder), device="cpu")


def logits_of(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(text=PROMPT, images=noise_image(0), return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs).logits
    return logits


def same(folder: Path, model: Any) -> bool:
    """Whether the checkpoint passes the check, and what is loaded gives the model's own logits."""
    check_model(spec(folder))
    loaded = load_model(spec(folder), torch.device("cpu"))
    processor = load_processor(spec(folder))
    return torch.equal(logits_of(loaded, processor), logits_of(model, processor))


def old_name(name: str) -> str:
    """As transformers called it before 4.52, and llava-hf's checkpoints still do."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def write_weights(folder: Path, weights: dict[str, torch.Tensor], *, shards: int = 1) -> None:
    """In place of what the folder holds, in so many files."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    whole = {name: weight.clone() for name, weight in weights.items()}
    if shards == 1:
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    weight_map = {weight: names[n % shards] for n, weight in enumerate(sorted(whole))}
    for name in names:
        part = {weight: whole[weight] for weight, where in weight_map.items() if where == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("names", ["old", "new"])
def test_old_and_new_names_in_one_file_and_in_many(tmp_path: Path, names: str, shards: int) -> None:
    model = tiny_model()
    weights = model.state_dict()
    if names == "old":
        weights = {old_name(name): weight for name, weight in weights.items()}
        assert "vision_tower.vision_model.embeddings.class_embedding" in weights
        assert "language_model.model.layers.1.mlp.up_proj.weight" in weights
    write_checkpoint(tmp_path, model=model)
    write_weights(tmp_path, weights, shards=shards)
    assert same(tmp_path, model)


def test_shards_as_transformers_makes_them(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_processor().save_pretrained(tmp_path)
    assert len(open_checkpoint(spec(tmp_path)).weights) > 3
    assert same(tmp_path, model)


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("stored", ["with lm_head", "without"])
def test_tied_embeddings_with_and_without_an_lm_head_in_the_file(
    tmp_path: Path, names: str, stored: str
) -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    write_checkpoint(tmp_path, model=model)
    weights = dict(model.state_dict())
    if stored == "without":
        del weights["lm_head.weight"]
    if names == "old":
        weights = {old_name(name): weight for name, weight in weights.items()}
    write_weights(tmp_path, weights)
    assert same(tmp_path, model)


def test_an_lm_head_that_is_missing_and_not_tied_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weights = dict(tiny_model().state_dict())
    del weights["lm_head.weight"]
    write_weights(tmp_path, weights)
    with pytest.raises(SpecError, match=r"1 weights are missing, lm_head\.weight among them"):
        load_model(spec(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["slots", "plain"])
@pytest.mark.parametrize("size", [300, 320])
def test_added_tokens_and_embeddings_beyond_the_tokenizer(
    tmp_path: Path, size: int, kind: str
) -> None:
    """`size`: of the vocabulary; the tokenizer has fewer tokens, and more than it was made with."""
    processor, model = tiny_processor(), tiny_model(vocab_size=size)
    before = len(processor.tokenizer)
    added = [AddedToken(f"<place{n}>", special=n % 2 == 0) for n in range(290 - before)]
    processor.tokenizer.add_tokens(added)
    assert before < len(processor.tokenizer) == 290 < size
    write_checkpoint(tmp_path, model=model, processor=processor)
    assert same(tmp_path, model)
    loaded, own = load_model(spec(tmp_path), torch.device("cpu")), load_processor(spec(tmp_path))
    case = Case(noise_image(1), "USER: <image>\nIs <place7> red, <place8>? ASSISTANT:", 8)
    [[answer]] = engine_for(kind, loaded, own).submit([request_of(own, case)])
    check(answer, alone(model, processor, case))


def test_a_tokenizer_without_pad_token_works(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit(tmp_path / "tokenizer_config.json", pad_token=None)
    edit(tmp_path / "generation_config.json", pad_token_id=None)
    check_model(spec(tmp_path))
    model, processor = (
        load_model(spec(tmp_path), torch.device("cpu")),
        load_processor(spec(tmp_path)),
    )
    assert processor.tokenizer.pad_token is None
    assert end_tokens(model, processor) == [2]
    cases = [Case(noise_image(n), PROMPT.replace("What", "What " * n), 6) for n in range(4)]
    for kind in ("slots", "plain"):
        requests = [request_of(processor, case) for case in cases]
        for [answer], case in zip(
            engine_for(kind, model, processor).submit(requests), cases, strict=True
        ):
            check(answer, alone(tiny_model(), tiny_processor(), case))
