"""What decides an answer, and what does not."""

import json
import shutil

import pytest

from pipeline.fingerprint import digest, model_fingerprint, question_fingerprints
from schemas.job import JobSpec
from tests.models import hub_cache, shared_checkpoint


def job_of(**parts):
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x"},
            "ask": [{"id": "caption", "prompt": "Describe."}, {"from": "questions"}],
            "output": {"path": "y"},
            **parts,
        }
    )


def differing(before, after):
    names = before.keys() | after.keys()
    return {name for name in names if before.get(name) != after.get(name)}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(shared_checkpoint(), tmp_path / "checkpoint")


def of(folder, **parts):
    model = {"path": str(folder), **parts.pop("model", {})}
    return model_fingerprint(job_of(model=model, **parts))


def test_the_same_job_has_the_same_fingerprint_wherever_its_checkpoint_lies(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert of(folder) == of(moved)
    assert question_fingerprints(job_of()) == question_fingerprints(job_of())


@pytest.mark.parametrize(
    "parts",
    [
        {"name": "another"},
        {"source": {"format": "webdataset", "path": "z"}},
        {"output": {"path": "other", "rows_per_file": 7, "prompts": True}},
        {"resources": {"generate": {"batch_size": 3, "actors": 2}}},
        {"resources": {"preprocess": {"decode_timeout_s": 3, "decode_memory_bytes": 2**30}}},
        {"model": {"attention": "eager", "device": "cpu"}},
        {"max_failed_fraction": 0.5},
    ],
)
def test_what_does_not_decide_an_answer_is_not_in_it(folder, parts):
    assert of(folder, **parts) == of(folder)


@pytest.mark.parametrize(
    ("parts", "component"),
    [
        ({"model": {"dtype": "bfloat16"}}, "dtype"),
        ({"model": {"quantization": "4bit"}}, "quantization"),
        ({"model": {"system_prompt": "Be brief."}}, "system_prompt"),
        ({"source": {"format": "images", "path": "x", "columns": {"image": "c"}}}, "image"),
        ({"source": {"format": "images", "path": "x", "max_image_pixels": 99}}, "pixels"),
        ({"source": {"format": "images", "path": "x", "max_image_bytes": 99}}, "pixels"),
        ({"source": {"format": "images", "path": "x", "decode": "fast"}}, "pixels"),
        ({"source": {"format": "images", "path": "x", "where": "width > 5"}}, "where"),
        ({"source": {"format": "images", "path": "x", "allow_truncated": True}}, "pixels"),
        (
            {"source": {"format": "images", "path": "x", "columns": {"conversation": "c"}}},
            "conversation",
        ),
    ],
)
def test_a_spec_that_decides_answers_changes_its_component(folder, parts, component):
    assert differing(of(folder), of(folder, **parts)) == {component}


def test_a_refusal_can_say_how_images_are_decoded(folder):
    source = {"format": "images", "path": "x", "max_image_pixels": 9, "max_image_bytes": 8}
    assert of(folder, source=source)["pixels"] == (
        "exact, up to 9 pixels and 8 bytes, no truncated ones"
    )


def test_other_weights_change_the_weights_only(folder):
    before = of(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert differing(before, of(folder)) == {"weights"}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json"])
def test_another_processor_changes_the_processor(folder, name):
    before = of(folder)
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": 1}))
    assert differing(before, of(folder)) == {"processor"}


def test_another_template_changes_the_template(folder):
    before = of(folder)
    (folder / "chat_template.jinja").write_text("USER: <image> ASSISTANT:")
    assert "template" in differing(before, of(folder))


def test_a_readme_changes_nothing(folder):
    before = of(folder)
    (folder / "README.md").write_text("hello")
    assert of(folder) == before


def test_a_hub_model_is_known_by_its_commit(monkeypatch, tmp_path):
    with hub_cache(monkeypatch, tmp_path) as name:
        components = model_fingerprint(job_of(model={"path": name}))
    assert components["weights"] == "commit c0ffee"


def test_the_embedded_model_has_a_fingerprint():
    components = model_fingerprint(job_of())
    assert components["dtype"] == "float32"
    assert all(isinstance(value, str) and value for value in components.values())


def test_a_question_is_its_text_and_its_length():
    def changed(*ask, **parts):
        return differing(
            question_fingerprints(job_of()), question_fingerprints(job_of(ask=ask, **parts))
        )

    same, own = {"id": "caption", "prompt": "Describe."}, {"from": "questions"}
    assert changed({**same, "prompt": "Describe!"}, own) == {"caption"}
    assert changed({**same, "max_new_tokens": 9}, own) == {"caption"}
    assert changed(own, {**same, "max_new_tokens": 64}) == set()
    assert changed(same, own, generate={"max_new_tokens": 5}) == {"caption", "questions"}
    source = {"format": "images", "path": "x", "columns": {"questions": "vqa"}}
    for key in ({"stop": ["."]}, {"min_new_tokens": 2}, {"repetition_penalty": 1.1}):
        assert changed(same, own, generate=key) == {"caption", "questions"}
        assert changed({**same, **key}, own) == {"caption"}
    assert changed(same, own, source=source) == {"questions"}


def test_what_chance_decides_counts_only_where_tokens_are_drawn():
    own = {"from": "questions"}

    def prints(caption, **generate):
        asked = {"id": "caption", "prompt": "Describe.", **caption}
        return question_fingerprints(job_of(ask=[asked, own], generate=generate))

    warm = {"temperature": 0.5}
    assert differing(prints({}), prints(warm)) == {"caption"}
    assert differing(prints({}), prints({}, seed=7)) == set()
    assert differing(prints(warm), prints(warm, seed=7)) == {"caption"}
    for key in ({"top_p": 0.5}, {"top_k": 5}, {"n": 3}):
        assert differing(prints(warm), prints(warm, **key)) == {"caption"}


def test_a_json_schema_counts_with_the_order_of_its_keys():
    def prints(*names):
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        ask = [{"from": "questions", "json_schema": schema}]
        return question_fingerprints(job_of(ask=ask))["questions"]

    assert prints("a", "b") == prints("a", "b")
    assert prints("a", "b") != prints("b", "a")


def test_choices_count_in_their_order_and_nothing_that_is_decoded_does():
    def prints(**keys):
        return question_fingerprints(job_of(ask=[{"from": "questions", **keys}]))["questions"]

    def generated(**generate):
        ask = [{"from": "questions", "choices": ["a", "b"]}]
        return question_fingerprints(job_of(ask=ask, generate=generate))["questions"]

    each = [
        prints(),
        prints(choices=["a", "b"]),
        prints(choices=["b", "a"]),
        prints(choices=["a", "b"], length_normalise=True),
    ]
    assert len(set(each)) == len(each)
    assert generated(temperature=0.5, max_new_tokens=3) == each[1]


def test_a_digest_is_short_and_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": "ü"}) == digest({"b": "ü", "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({})) == 16
