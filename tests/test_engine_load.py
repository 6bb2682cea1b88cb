"""Checkpoints: what is refused before anything starts, and what is loaded."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine.check import check_model
from pipeline.engine.checkpoint import dtype_name, open_checkpoint, resolve
from pipeline.engine.load import (
    device_of,
    load_config,
    load_model,
    load_processor,
    own_padding_side,
)
from schemas.ask import GenerateSpec
from schemas.errors import SpecError
from schemas.job import ModelSpec
from tests.models import (
    CHAT_TEMPLATE,
    hub_cache,
    shared_checkpoint,
    tiny_model,
    tiny_processor,
    write_checkpoint,
)

CPU = torch.device("cpu")


def spec(path="embedded", **keys):
    return ModelSpec.model_validate({"path": str(path), **keys})


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(shared_checkpoint(), tmp_path / "checkpoint")


def edit(path, **changes):
    """Change keys of a JSON file; None takes a key out."""
    whole = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))


# What is refused


def refusal(path, **keys):
    with pytest.raises(SpecError) as caught:
        check_model(spec(path, **keys))
    return str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "~/no/such/folder"])
def test_a_path_that_does_not_exist(path):
    assert f"{os.path.expanduser(path)!r} does not exist" in refusal(path)


def test_a_file_in_place_of_a_folder(folder):
    assert "name the folder" in refusal(folder / "config.json")


def test_a_url_of_a_kind_that_nobody_knows():
    assert "cannot open this kind of URL" in refusal("nonsense://bucket/model")


def test_a_url_of_a_local_folder_is_that_folder(folder):
    check_model(spec(folder.as_uri()))
    assert open_checkpoint(spec(folder.as_uri())).path == str(folder)


def test_a_folder_without_a_config(tmp_path):
    assert "no config.json" in refusal(tmp_path)


def test_a_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}, "llava_llama"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "LlavaLlamaForCausalLM"),
        ({"model_type": "bert"}, "'bert'"),
    ],
)  # fmt: skip
def test_another_architecture_is_named(folder, changes, named):
    edit(folder / "config.json", **changes)
    assert named in refusal(folder)


def test_a_generation_config_that_is_more_than_greedy(folder):
    edit(folder / "generation_config.json", no_repeat_ngram_size=3)
    assert "no_repeat_ngram_size=3, which is not supported" in refusal(folder)


def test_a_generation_config_with_settings_that_the_job_has_to_say_itself(folder):
    edit(folder / "generation_config.json", repetition_penalty=1.2)
    assert "repetition_penalty=1.2, which holds only where the job says so" in refusal(folder)
    check_model(spec(folder), GenerateSpec(repetition_penalty=1.1))


def test_neutral_and_sampling_keys_of_a_generation_config_pass(folder):
    edit(folder / "generation_config.json", repetition_penalty=1.0, do_sample=True, top_p=0.9)
    check_model(spec(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(folder)


def test_pickled_weights_only_with_the_remedy(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickles (pytorch_model.bin), which can run code when they are opened" in refusal(folder)


def test_a_missing_shard_of_the_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
    tiny_processor().save_pretrained(tmp_path)
    check_model(spec(tmp_path))
    (tmp_path / sorted(p.name for p in tmp_path.glob("*-of-*.safetensors"))[1]).unlink()
    assert "model-00002-of-" in refusal(tmp_path)


def test_weights_that_are_cut_off(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "broken or cut off" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "what"), [("tokenizer.json", "tokenizer"), ("processor_config.json", "processor")]
)
def test_a_missing_tokenizer_or_processor(folder, name, what):
    (folder / name).unlink()
    assert f"has no {what}" in refusal(folder)


def test_flash_attention_on_the_cpu_or_in_float32(folder):
    assert "needs a GPU" in refusal(folder, attention="flash_attention_2", device="cpu")
    assert "is float32" in refusal(folder, attention="flash_attention_2")


def test_a_revision_of_a_folder(folder):
    assert "is a folder" in refusal(folder, revision="main")


def test_a_hub_that_cannot_be_reached_fails_fast_and_names_the_id(monkeypatch, tmp_path):
    start = time.monotonic()
    with hub_cache(monkeypatch, tmp_path):
        assert "model other/llava@v2: the hub cannot be reached" in refusal(
            "other/llava", revision="v2"
        )
    assert time.monotonic() - start < 15


def test_a_name_that_is_no_hub_id(monkeypatch, tmp_path):
    with hub_cache(monkeypatch, tmp_path):
        assert "neither a folder nor a hub id" in refusal("my model/x/y")


# What passes


@pytest.mark.parametrize("path", ["embedded", "shared"])
def test_a_good_checkpoint_passes(path):
    check_model(spec(shared_checkpoint() if path == "shared" else path))


def test_a_model_in_the_cache_is_used_where_the_hub_cannot_be_reached(monkeypatch, tmp_path):
    with hub_cache(monkeypatch, tmp_path) as name:
        check_model(spec(name))
        checkpoint = open_checkpoint(spec(name))
        assert load_processor(spec(name)).chat_template == CHAT_TEMPLATE
    assert checkpoint.commit == "c0ffee"


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve(spec("~/model")) == "/home/me/model"


def test_checking_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from pipeline.engine.check import check_model; "
        "import pipeline.engine.load, pipeline.fingerprint; "
        "from schemas.job import ModelSpec; check_model(ModelSpec()); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_worker_imports_is_never_looked_through_for_garbage():
    code = (
        "import gc; from pipeline.engine.load import import_libraries; "
        "before, _ = len(gc.get_objects()), import_libraries(); looked_through = gc.get_objects(); "
        "assert gc.isenabled(); assert gc.get_freeze_count() > 5 * before > 0; "
        "assert len(looked_through) < before / 5, len(looked_through)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("path", "dtype", "name"),
    [
        ("embedded", "auto", "float32"),
        ("embedded", "bfloat16", "bfloat16"),
        ("folder", "auto", "bfloat16"),
        ("folder", "float16", "float16"),
    ],
)
def test_the_dtype_is_the_specs_or_the_checkpoints_own(folder, path, dtype, name):
    edit(folder / "config.json", dtype="bfloat16")
    one = spec(folder if path == "folder" else path, dtype=dtype)
    assert dtype_name(one, open_checkpoint(one)) == name


@pytest.mark.parametrize(("key", "value"), [("torch_dtype", "float16"), ("dtype", None)])
def test_the_dtype_of_older_and_of_silent_configs(folder, key, value):
    edit(folder / "config.json", **{"dtype": None, key: value})
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text.pop("dtype", None)
    edit(folder / "config.json", text_config=text)
    one = spec(folder)
    assert dtype_name(one, open_checkpoint(one)) == (value or "float32")


# What is loaded


def test_the_model_is_loaded_as_it_was_saved():
    model = load_model(spec(shared_checkpoint()), CPU)
    assert not model.training
    saved = tiny_model().state_dict()
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_loaded_in_the_dtype_asked_for(dtype):
    model = load_model(spec(shared_checkpoint(), dtype=dtype), CPU)
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_is_the_one_asked_for(attention):
    model = load_model(spec(shared_checkpoint(), attention=attention), CPU)
    assert model.config.text_config._attn_implementation == attention


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="flash-attn may be installed here")
def test_flash_attention_that_is_not_installed_is_named():
    with pytest.raises(SpecError, match="flash-attn is not installed"):
        load_model(spec(shared_checkpoint(), attention="flash_attention_2"), CPU)


@pytest.mark.parametrize("layout", ["hub", "state_dict"])
def test_weights_under_the_names_of_other_versions_load_too(folder, layout):
    """`hub` as llava-hf/llava-1.5-7b-hf has them, `state_dict` as transformers 4.52 saved them."""
    path, model = folder / "model.safetensors", tiny_model()
    if layout == "hub":
        weights = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1): weight
            for name, weight in load_file(path).items()
        }
        assert "vision_tower.vision_model.embeddings.class_embedding" in weights
        assert "language_model.model.embed_tokens.weight" in weights
        assert "language_model.lm_head.weight" in weights
    else:
        weights = dict(model.state_dict())
        assert "model.language_model.embed_tokens.weight" in weights
    save_file(weights, path, metadata={"format": "pt"})
    loaded = load_model(spec(folder), CPU).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_weights_that_are_missing_are_not_drawn_at_random(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    gone = next(name for name in weights if "multi_modal_projector" in name)
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SpecError, match="1 weights are missing"):
        load_model(spec(folder), CPU)


def test_weights_of_another_shape_are_refused(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text, "intermediate_size": 96})
    with pytest.raises(SpecError, match="cannot be loaded"):
        load_model(spec(folder), CPU)


def test_the_processor_uses_pillow_and_pads_left():
    processor = load_processor(spec(shared_checkpoint()))
    assert processor.image_processor.backend == "pil"
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_that_a_checkpoint_brings_is_known(folder, side):
    edit(folder / "tokenizer_config.json", padding_side=side)
    assert own_padding_side(spec(folder)) == side
    assert load_processor(spec(folder)).tokenizer.padding_side == "left"


def test_a_broken_tokenizer_is_a_fault_of_the_spec(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match="cannot be loaded"):
        load_processor(spec(folder))


def test_an_image_token_that_the_model_does_not_know_is_refused(folder):
    edit(folder / "config.json", image_token_index=7)
    with pytest.raises(SpecError, match="image_token_index 7"):
        load_processor(spec(folder))


def test_a_tokenizer_without_the_image_token_is_refused(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<image>"', '"<picture>"'))
    edit(folder / "tokenizer_config.json", extra_special_tokens=None, image_token=None)
    with pytest.raises(SpecError, match="the tokenizer has no token '<image>'"):
        load_processor(spec(folder))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path):
    processor = tiny_processor()
    processor.tokenizer.add_tokens([f"extra{i}" for i in range(60)])
    write_checkpoint(tmp_path, processor=processor)
    with pytest.raises(SpecError, match="embeds only 256"):
        load_processor(spec(tmp_path))


def test_a_config_that_leaves_the_context_out_has_the_default_of_its_kind(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    del text["max_position_embeddings"]
    edit(folder / "config.json", text_config=text)
    assert load_config(spec(folder)).get_text_config().max_position_embeddings == 2048


def test_loading_says_nothing(capfd):
    load_model(spec(shared_checkpoint()), CPU)
    load_processor(spec(shared_checkpoint()))
    assert capfd.readouterr() == ("", "")


def test_the_device_is_the_cpu_where_there_is_no_gpu():
    assert device_of(spec(device="cpu")) == CPU
    if not torch.cuda.is_available():
        assert device_of(spec()) == CPU
        with pytest.raises(SpecError, match="sees no GPU"):
            device_of(spec(device="cuda"))
