"""Checkpoints that cannot work: `lavaflow run` says why in one message, and starts nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.load import dump_spec
from tests.models import noise_image, shared_checkpoint, tiny_model
from tests.test_engine_repair import edit
from tests.whole_jobs import job_of


def a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="200KB")
    next(folder.glob("model-00002-of-*")).unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def a_shard_that_is_cut_off(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="200KB")
    path = next(folder.glob("model-00002-of-*"))
    path.write_bytes(path.read_bytes()[:7])


def an_unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="lava_lamp", architectures=["LavaLampForLight"])


def a_tokenizer_without_image_token(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<image>"', '"<picture>"'))
    edit(folder / "tokenizer_config.json", extra_special_tokens=None, image_token=None)


def an_image_token_of_another_id(folder: Path) -> None:
    edit(folder / "config.json", image_token_index=9)


def a_tokenizer_that_is_cut_off(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def a_tokenizer_without_words(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def more_tokens_than_embeddings(folder: Path) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text())
    extra = {**whole["added_tokens"][0], "id": 256, "content": "<new>"}
    edit(folder / "tokenizer.json", added_tokens=[*whole["added_tokens"], extra])


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (a_missing_shard, "model.safetensors.index.json names model-00002-of-"),
    (cut_off, "model.safetensors is broken or cut off"),
    (a_shard_that_is_cut_off, "model-00002-of-"),
    (an_unknown_architecture, "is a LavaLampForLight (model_type 'lava_lamp')"),
    (a_tokenizer_without_image_token, "the tokenizer has no token '<image>', which stands for"),
    (an_image_token_of_another_id, "image token '<image>' is 4, config.json's image_token_index 9"),
    (a_tokenizer_that_is_cut_off, "tokenizer.json is not JSON"),
    (a_tokenizer_without_words, "tokenizer.json has no vocabulary: get it again"),
    (more_tokens_than_embeddings, "largest id is 256, but the model embeds only 256 tokens"),
]


@pytest.mark.parametrize(("break_it", "told"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_run_with_a_broken_checkpoint_is_one_message_and_status_2(
    tmp_path: Path, break_it: Callable[[Path], None], told: str
) -> None:
    model = shutil.copytree(shared_checkpoint(), tmp_path / "model")
    break_it(model)
    noise_image(0).save(tmp_path / "one.png")
    job = job_of(
        "",
        tmp_path / "out",
        source={"format": "images", "path": str(tmp_path / "one.png")},
        ask=[{"id": "what", "prompt": "What is this?"}],
        model={"path": str(model)},
    )
    (tmp_path / "job.yaml").write_text(dump_spec(job))
    result = CliRunner().invoke(main, ["run", str(tmp_path / "job.yaml")], prog_name="lavaflow")
    assert result.exit_code == 2
    assert result.stdout == ""
    [message] = result.stderr.strip().splitlines()
    assert message.startswith("Error: ")
    assert str(model) in message
    assert told in message
    assert not (tmp_path / "out").exists()
