"""`lavaflow doctor`: what works is said to work, and what is broken is named with its remedy."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from jobs.cli import main
from jobs.doctor import Doctor, examine
from jobs.doctor_processor import QUESTIONS_OF, look_over, mixed_work
from jobs.doctor_text import told
from jobs.doctor_trials import Trials, build_engine
from jobs.subject import load_subject
from jobs.workload import noise
from pipeline.engine.request import Answer
from pipeline.engine.sampling import Chooser
from schemas.job import ModelSpec
from tests.families import saved_kind, saved_slow
from tests.models import shared_checkpoint, tiny_model, tiny_processor, write_checkpoint

Edit = Callable[[Path], None]


def quiet(text: str) -> None:
    pass


def lavaflow(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="lavaflow")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(shared_checkpoint(), tmp_path / "checkpoint")


def examined(folder: Path, build: Any = build_engine) -> tuple[Doctor, Trials]:
    """A model that has been described, and is to be tried."""
    spec = ModelSpec(path=str(folder), device="cpu")
    subject = load_subject(spec)
    work = mixed_work(spec, subject, noise(subject.image_shape, len(QUESTIONS_OF), seed=0))
    doctor = Doctor(spec, quiet, build)
    doctor.describe(subject, work)
    return doctor, Trials(spec, work, build)


def found(report: dict[str, Any], about: str) -> dict[str, Any]:
    (finding,) = (each for each in report["findings"] if each["about"] == about)
    return finding


# A model that is whole


@pytest.mark.parametrize("name", ["LLaVA-NeXT, CLIP, Mistral", "LLaVA-OneVision, SigLIP, Qwen2"])
def test_a_model_of_tiles_is_whole(name: str) -> None:
    doctor, trials = examined(saved_kind(name))
    finding = next(look_over(trials.spec, load_subject(trials.spec)))
    assert finding.state == "ok"
    assert "tiles of 32 x 32 pixels" in finding.text
    assert "at 1000 x 300 pixels" in finding.text
    assert doctor.report["engine"]["name"] == "slots"
    assert trials.exact()[0]["ok"]


@pytest.mark.parametrize("build", ["own", "another"])
def test_a_model_on_the_slow_path_is_said_to_be_and_compared(
    build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if build == "another":
        monkeypatch.setattr(Chooser, "choose", _second_likeliest)
    report = examine(ModelSpec(path=str(saved_slow("Idefics3"))), say=quiet)
    assert report["engine"]["name"] == "alone"
    assert "Idefics3ForConditionalGeneration is none of Llava" in found(report, "engine")["text"]
    assert report["exact"]["answers"] == 10
    assert report["ok"] == report["exact"]["ok"] == (build == "own")
    assert "slow path" in told(report)


def _second_likeliest(self: Any, logits: torch.Tensor, saids: Any) -> Any:
    token = int(logits[0].topk(2).indices[1])
    return torch.tensor([token]), [[float(token), -1.0]]


def test_a_processor_that_counts_other_tiles_than_the_model_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(saved_kind("LLaVA-OneVision, SigLIP, Qwen2"), tmp_path / "checkpoint")
    edit(folder / "processor_config.json", vision_aspect_ratio="anyres_max_1")
    finding = next(
        look_over(ModelSpec(path=str(folder)), load_subject(ModelSpec(path=str(folder))))
    )
    assert finding.state == "wrong"
    assert "vision_aspect_ratio is 'anyres_max_1'" in finding.text


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("doctor") / "checkpoint"
    shutil.copytree(shared_checkpoint(), folder)
    edit(folder / "tokenizer_config.json", padding_side="right")
    return examine(ModelSpec(path=str(folder)), say=quiet)


def test_the_embedded_model_is_whole() -> None:
    result = lavaflow("doctor", "embedded")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("embedded: 2,225,536 parameters, float32, on ")
    assert "token for token what transformers' generate gives" in " ".join(result.stdout.split())
    assert result.stdout.endswith("\nNothing is wrong.\n")


def test_packed_and_mixed_batches_are_compared_with_each_prompt_alone(
    report: dict[str, Any],
) -> None:
    assert report["ok"]
    exact = report["exact"]
    assert (exact["answers"], exact["equal"], exact["different"]) == (11, 11, [])
    assert exact["others_in_a_small_room"] == 0
    assert found(report, "answers")["state"] == "ok"


def test_each_way_to_run_it_is_tried(report: dict[str, Any]) -> None:
    assert {name: dtype["works"] for name, dtype in report["dtype"].items()} == {
        "float32": True,
        "bfloat16": True,
        "float16": True,
    }
    assert report["dtype"]["bfloat16"]["tokens"] > 80
    assert report["attention"]["eager"] == {"works": True, "dtype": "float32", "other_answers": 0}
    if not torch.cuda.is_available():
        assert "needs a GPU" in report["attention"]["flash_attention_2"]["why"]
    for quantization in ("8bit", "4bit"):
        quantized = report["quantization"][quantization]
        assert quantized["works"]
        assert quantized["weights_bytes"] < report["memory"]["weights_bytes"]
        assert 0 < quantized["forced"]["top"] < 1


def test_the_engine_and_its_memory_are_told(report: dict[str, Any]) -> None:
    assert report["engine"] == {"name": "slots", "why": None}
    memory = report["memory"]
    # 2 layers, keys and values, 2 heads of 16 numbers in float32
    assert memory["kv_bytes_a_token"] == 2 * 2 * 2 * 16 * 4
    assert memory["kv_bytes_an_image"] == 32 * memory["kv_bytes_a_token"]
    assert memory["images_at_once"] > 1000


def test_the_report_is_json_and_text(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    text = told(report)
    assert "works    8bit " in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_model_that_slots_are_not_exact_for_gets_the_plain_engine(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    write_checkpoint(tmp_path, model=tiny_model(rope_parameters=rope))
    doctor, trials = examined(tmp_path)
    assert doctor.report["engine"]["name"] == "plain"
    assert "dynamic RoPE" in doctor.findings[0].text
    exact, _ = trials.exact()
    assert exact["ok"], exact


# What is set right


def test_right_padding_is_shown_to_be_wrong_and_set_right(report: dict[str, Any]) -> None:
    padding = found(report, "padding")
    assert padding["state"] == "mended"
    assert (
        "answers that transformers' own generate gives to such a batch, 10 are wrong"
        in (padding["text"])
    )
    assert "Lavaflow pads on the left" in padding["text"]


def test_a_missing_template_is_set_right(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, processor=tiny_processor(chat_template=None))
    (tmp_path / "generation_config.json").write_text("{}")
    doctor = Doctor(ModelSpec(path=str(tmp_path)), quiet, no_engine)
    with pytest.raises(NotImplementedError):
        doctor.examine()
    template = next(f for f in doctor.findings if f.about == "chat template")
    assert template.state == "mended"
    assert "USER: <image>\\nWhat is this? ASSISTANT:" in template.text


def smaller_patches(folder: Path) -> None:
    edit(folder / "processor_config.json", patch_size=4)


def no_patch_size(folder: Path) -> None:
    edit(folder / "processor_config.json", patch_size=None)


def a_class_token_too_few(folder: Path) -> None:
    edit(folder / "processor_config.json", num_additional_image_tokens=0)


def other_strategy(folder: Path) -> None:
    edit(folder / "processor_config.json", vision_feature_select_strategy="full")


@pytest.mark.parametrize(
    ("break_it", "said", "remedy"),
    [
        (smaller_patches, "patch_size is 4; 8 is used", "write patch_size: 8 into it"),
        (no_patch_size, "patch_size is missing; 8 is used", "write patch_size: 8 into it"),
        (a_class_token_too_few, "num_additional_image_tokens is 0; 1 is used", "tokens: 1 into it"),
        (other_strategy, "strategy is 'full'; 'default' is used", "strategy: 'default' into it"),
    ],
)
def test_a_processor_that_counts_wrong_is_repaired(
    folder: Path, break_it: Edit, said: str, remedy: str
) -> None:
    break_it(folder)
    doctor = Doctor(ModelSpec(path=str(folder)), quiet, no_engine)
    with pytest.raises(NotImplementedError):
        doctor.examine()
    processor, tokens = doctor.findings[:2]
    assert (processor.about, processor.state) == ("processor", "mended")
    assert processor.text.startswith("repaired: processor_config.json: ")
    assert said in processor.text
    assert remedy in processor.text
    assert (tokens.about, tokens.state) == ("image tokens", "ok")


# What is wrong


def no_engine(*_: Any, **__: Any) -> Any:
    """Nothing is tried of a model that is wrong so far."""
    raise NotImplementedError


def larger_images(folder: Path) -> None:
    path = folder / "processor_config.json"
    images = json.loads(path.read_text())["image_processor"]
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    edit(path, image_processor={**images, **size})


def no_image_token(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<image>"', '"<picture>"'))
    edit(folder / "tokenizer_config.json", extra_special_tokens=[], image_token=None)


def a_template_without_the_image(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("USER: what? ASSISTANT:")


def missing_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(dict(sorted(weights.items())[1:]), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "about", "said"),
    [
        (larger_images, "image tokens", "makes images of 64 x 64 pixels, which the model does not"),
        (no_image_token, "checkpoint", "the tokenizer has no token '<image>', which stands for"),
        (a_template_without_the_image, "checkpoint", "wrote <image> 0 times for one image"),
        (missing_weights, "checkpoint", "1 weights are missing"),
    ],
)
def test_what_is_broken_is_named_with_its_remedy(
    folder: Path, break_it: Edit, about: str, said: str
) -> None:
    break_it(folder)
    report = examine(ModelSpec(path=str(folder)), say=quiet, build=no_engine)
    assert not report["ok"]
    finding = found(report, about)
    assert finding["state"] == "wrong"
    assert said in finding["text"]
    assert told(report).endswith(
        f"Something is wrong: {about}. Nothing else was tried: mend that, and ask again.\n"
    )


def one_token_wrong(subject: Any, **options: Any) -> Any:
    """An engine whose last answer has another first token."""
    engine = build_engine(subject, **options)

    class Wrong:
        def submit(self, requests: Any) -> Any:
            answered = engine.submit(requests)
            last: Answer = answered[-1][-1]
            wrong = (last.token_ids[0] ^ 1, *last.token_ids[1:])
            answered[-1][-1] = replace(last, token_ids=wrong)
            return answered

    return Wrong()


def test_an_engine_that_answers_otherwise_than_the_model_alone_is_found(folder: Path) -> None:
    doctor, trials = examined(folder, one_token_wrong)
    doctor.exact(trials, needed=0, available=1)
    finding = next(finding for finding in doctor.findings if finding.about == "answers")
    assert finding.state == "wrong"
    assert "1 of 11 answers are others in a batch than alone" in finding.text


def all_tokens_wrong(subject: Any, **options: Any) -> Any:
    engine = build_engine(subject, **options)

    class Wrong:
        def submit(self, requests: Any) -> Any:
            return [
                [replace(one, token_ids=[token ^ 1 for token in one.token_ids]) for one in answers]
                for answers in engine.submit(requests)
            ]

    return Wrong()


def small_room_wrong(subject: Any, **options: Any) -> Any:
    """An engine that is wrong where there is little room."""
    little = options.get("resources") is not None
    return (one_token_wrong if little else build_engine)(subject, **options)


def test_an_engine_that_is_wrong_in_a_small_room_is_found(folder: Path) -> None:
    _, trials = examined(folder, small_room_wrong)
    exact, _ = trials.exact()
    assert not exact["ok"]
    assert (exact["equal"], exact["others_in_a_small_room"]) == (11, 1)


def test_a_dtype_that_gives_wrong_answers_does_not_work(folder: Path) -> None:
    _, trials = examined(folder, all_tokens_wrong)
    assert not trials.dtype("bfloat16", exact=None, quantized={})["works"]


def test_a_model_too_large_for_float32_here_is_not_said_to_be_exact(folder: Path) -> None:
    doctor = Doctor(ModelSpec(path=str(folder)), quiet, no_engine)
    assert doctor.exact(None, needed=28 * 10**9, available=16 * 10**9) is None  # type: ignore[arg-type]
    (finding,) = doctor.findings
    assert finding.state == "unknown"
    assert "that takes about 28 GB, and 16 GB are free" in finding.text


def test_nothing_is_tried_in_float32_where_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def build(subject: Any, **options: Any) -> Any:
        loaded.append(subject.dtype)
        return build_engine(subject, **options)

    monkeypatch.setattr("jobs.doctor.FLOAT32_BYTES", 1e12)
    report = examine(ModelSpec(path=str(folder), dtype="bfloat16"), say=quiet, build=build)
    assert report["ok"]
    assert set(loaded) == {"bfloat16", "float16"}
    assert set(report["dtype"]) == {"bfloat16", "float16"}
    assert report["attention"]["eager"] == {"works": True, "dtype": "bfloat16"}
    assert told(report).endswith("Nothing is wrong, as far as it was tried.\n")


# The command


def test_a_broken_model_ends_with_status_1_and_json(folder: Path) -> None:
    larger_images(folder)
    result = lavaflow("doctor", str(folder), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_a_model_that_is_not_there_is_bad_usage() -> None:
    result = lavaflow("doctor", "/no/such/model")
    assert result.exit_code == 2
    assert "Error: model.path '/no/such/model' does not exist" in result.stderr
