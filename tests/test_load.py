"""`jobs/load.py`, `mistakes.py`, `yaml12.py`, `quick.py`: from what a person wrote to a JobSpec."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import yaml12
from jobs.load import absolute, build_spec, dump_spec, load_spec, override
from jobs.mistakes import every_key
from jobs.quick import guess_format, question_asks
from schemas.errors import SpecError
from schemas.job import JobSpec

SPEC = """\
source: {format: images, path: /photos}
ask: [{id: caption, prompt: Describe the image.}]
output: {path: /answers}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(SPEC)
    return file


def minimal(**changes: Any) -> dict[str, Any]:
    return {**yaml12.load(SPEC), **changes}


def mistakes_of(**changes: Any) -> str:
    with pytest.raises(SpecError) as found:
        build_spec(minimal(**changes), origin="job.yaml")
    return str(found.value)


# YAML


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "Yes", "NO", "y", "n", "12:30"])
def test_words_that_yaml_1_1_turns_into_something_else_stay_text(word: str) -> None:
    assert yaml12.load(word) == word


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("1e-4", 1e-4),
        (".inf", float("inf")),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert yaml12.load(text) == value
    assert type(yaml12.load(text)) is type(value)


@settings(deadline=None)
@given(st.text())
def test_text_survives_dumping_and_loading(text: str) -> None:
    dumped = yaml12.dump({"prompt": text})
    assert yaml12.load(dumped) == {"prompt": text}
    assert yaml.safe_load(dumped) == {"prompt": text}


def test_a_merged_key_can_be_given_again_but_a_key_cannot_be_given_twice() -> None:
    merged = yaml12.load("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a}")
    assert merged["b"] == {"x": 3, "y": 2}
    with pytest.raises(yaml.YAMLError, match="the key 'x' is given twice"):
        yaml12.load("a: {x: 1, x: 2}")


def test_a_repeated_key_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(SPEC + "output: {path: /elsewhere}\n")
    with pytest.raises(SpecError) as found:
        load_spec(str(file))
    assert str(found.value) == f"{file}, line 4, column 1: the key 'output' is given twice"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: [", "line 1, column 10: expected the node content, but found '<stream end>'"),
        ("", ": is empty; a spec is a mapping with source, ask and output"),
        ("- a", ": holds ['a']; a spec is a mapping with source, ask and output"),
        ("ask: !!binary aGk=", ": holds a value that no key takes: "),
        ("ask: &a [*a]", ": holds a value that no key takes: "),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as found:
        load_spec(str(file))
    assert message in str(found.value)


@pytest.mark.parametrize(
    "text",
    [
        *("!!int abc", "!!int ''", "!!float ''", "!!bool maybe", "!!timestamp abc"),
        *("!!timestamp 2024-99-99", "1" * 5000, "0x" + "f" * 5000, "[" * 3000),
    ],
)
def test_a_value_that_yaml_cannot_make_is_an_error_of_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="holds a value that cannot be read: "):
        yaml12.load(text)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("~nosuchuser/job.yaml", "~nosuchuser/job.yaml: there is no such file"),
        ("a\0b", "a\0b: cannot be read: embedded null byte"),
    ],
)
def test_a_strange_path_of_a_spec_is_told(path: str, told: str) -> None:
    with pytest.raises(SpecError) as found:
        load_spec(path)
    assert str(found.value) == told


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.yaml: there is no such file"):
        load_spec(str(tmp_path / "nothing.yaml"))


# Overrides


def test_the_file_overrides_the_defaults_and_set_overrides_the_file(spec: Path) -> None:
    spec.write_text(SPEC + "generate: {max_new_tokens: 8}\n")
    assert load_spec(str(spec)).generate.max_new_tokens == 8
    assert load_spec(str(spec), ["generate.max_new_tokens=9"]).generate.max_new_tokens == 9
    assert load_spec(str(spec)).resources.generate.batch_size == 16


def test_set_reaches_into_lists_and_makes_what_is_not_there(spec: Path) -> None:
    job = load_spec(
        str(spec),
        [
            "ask.0.prompt=Is it a = b?",
            "ask.1={id: second, prompt: yes}",
            "ask.2.from=questions",
            "resources.preprocess.actors=[1, 2]",
        ],
    )
    assert [getattr(ask, "prompt", None) for ask in job.ask] == ["Is it a = b?", "yes", None]
    assert job.units == ("caption", "second", "questions")
    assert job.resources.preprocess.actors == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "generate.batch_size",
            "--set 'generate.batch_size': write it as KEY=VALUE, as in generate.batch_size=8",
        ),
        (
            "source.path.x=1",
            "--set 'source.path.x=1': source.path is '/photos', which has no 'x' in it",
        ),
        (
            "ask.5.id=x",
            "--set 'ask.5.id=x': ask is a list of 1; write ask.N with N from 0, 1 to add an entry",
        ),
        (
            "ask.².id=x",
            "--set 'ask.².id=x': ask is a list of 1; write ask.N with N from 0, 1 to add an entry",
        ),
        (
            "ask=[",
            "--set 'ask=[', line 1, column 2: expected the node content, but found '<stream end>'",
        ),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError) as found:
        override(minimal(), [text])
    assert str(found.value) == message


def test_overriding_leaves_the_original_alone() -> None:
    data = minimal()
    override(data, ["ask.0.id=other"])
    assert data == minimal()


# Mistakes


def test_an_unknown_key_is_named_with_its_value_and_the_likely_one() -> None:
    assert mistakes_of(generate={"max_new_tokns": 32}) == (
        "job.yaml: generate.max_new_tokns: unknown key (value 32); did you mean max_new_tokens?"
    )


def test_a_key_in_the_wrong_part_is_told_where_it_belongs() -> None:
    assert mistakes_of(generate={"batch_size": 8}) == (
        "job.yaml: generate.batch_size: unknown key (value 8); "
        "did you mean resources.generate.batch_size?"
    )


def test_a_key_like_no_other_gets_the_list_of_known_ones() -> None:
    assert mistakes_of(resources={"zzz": 1}) == (
        "job.yaml: resources.zzz: unknown key (value 1); "
        "known keys: preprocess, generate, bytes_in_flight"
    )


def test_every_mistake_has_its_line() -> None:
    told = mistakes_of(
        source={"format": "image", "path": 5, "storage": {"anon": "yes"}},
        ask=[{"id": 1, "promt": "b"}, {"form": "questions"}, {"from": "x"}, "Is it?"],
        model={"dtype": "flaot32"},
        resources={"preprocess": {"actors": [1]}, "generate": {"gpus": -1, "batch_size": True}},
        max_failed_fraction="a",
    )
    assert told.splitlines() == [
        "job.yaml: 14 mistakes",
        "  source.format: 'image' should be 'webdataset', 'parquet', 'images' or 'manifest'; "
        "did you mean images?",
        "  source.path: 5 should be a string or a list",
        "  source.storage.anon: 'yes' should be true or false",
        "  ask.0.id: 1 should be a string",
        "  ask.0.promt: unknown key (value 'b'); did you mean prompt?",
        "  ask.1.id: is missing",
        "  ask.1.form: unknown key (value 'questions'); did you mean from?",
        "  ask.2.from: 'x' should be 'questions'",
        "  ask.3: 'Is it?' should be a mapping of keys",
        "  model.dtype: 'flaot32' should be 'auto', 'float32', 'bfloat16' or 'float16'; "
        "did you mean float32?",
        "  resources.preprocess.actors.1: is missing",
        "  resources.generate.gpus: -1 should be greater than or equal to 0",
        "  resources.generate.batch_size: True should be a whole number",
        "  max_failed_fraction: 'a' should be a number",
    ]


def test_an_empty_text_is_told_without_a_suggestion() -> None:
    told = mistakes_of(ask=[{"id": "a", "prompt": ""}])
    assert told == "job.yaml: ask.0.prompt: '' should have at least 1 character"


def test_a_key_of_the_other_kind_of_question_is_told_as_such() -> None:
    told = mistakes_of(ask=[{"from": "questions", "id": "x"}])
    assert told == "job.yaml: ask.0.id: unknown key (value 'x'); {from: questions} takes no id"


def test_text_with_half_a_character_is_told_with_its_key() -> None:
    told = mistakes_of(ask=[{"id": "a", "prompt": "b\udc80"}])
    assert told == "job.yaml: ask.0.prompt: 'b\\udc80' is not valid Unicode text"


@pytest.mark.parametrize("path", ["a\0b", "~\0"])
def test_a_path_with_a_nul_in_it_is_told_with_its_key(path: str) -> None:
    told = mistakes_of(output={"path": path})
    assert told == f"job.yaml: output.path: {path!a} has a NUL in it; take it out"


def test_a_mistake_inside_a_list_of_paths_names_the_entry() -> None:
    told = mistakes_of(source={"format": "images", "path": ["a", 5]})
    assert told == "job.yaml: source.path.1: 5 should be a string"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ask": []}, "ask: is empty; give at least one {id, prompt} or {from: questions}"),
        (
            {"ask": [{"id": "a", "prompt": "b"}, {"id": "a", "prompt": "c"}]},
            "ask: the id 'a' is given twice; ids must be distinct",
        ),
        (
            {"ask": [{"id": "questions", "prompt": "b"}]},
            "ask.0.id: `questions` stands for the row's own questions; rename it",
        ),
        (
            {"resources": {"preprocess": {"actors": [3, 1]}}},
            "resources.preprocess.actors: wants [fewest, most] with 1 <= fewest <= most",
        ),
    ],
)
def test_contradictions_are_told_as_the_spec_words_them(changes: dict[str, Any], told: str) -> None:
    assert mistakes_of(**changes) == f"job.yaml: {told}"


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(mistakes_of(resources={"zzz": "x" * 1000})) < 200


def test_every_key_of_the_spec_is_known_to_the_suggestions() -> None:
    keys = set(every_key())
    assert {"source.columns.id", "resources.generate.gpus", "output.storage.anon"} <= keys


# Paths


def test_relative_local_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "llava").mkdir()
    job = build_spec(
        minimal(
            source={"format": "webdataset", "path": ["shards/{00..03}.tar", "s3://b/*.tar", "~/x"]},
            output={"path": "./out/"},
            model={"path": "llava"},
        ),
        origin="job.yaml",
    )
    assert job.source.paths == (
        f"{tmp_path}/shards/{{00..03}}.tar",
        "s3://b/*.tar",
        "/home/somebody/x",
    )
    assert job.output.path == f"{tmp_path}/out"
    assert job.model.path == f"{tmp_path}/llava"


@pytest.mark.parametrize(
    ("path", "is_local"),
    [
        ("a::b.tar", True),
        ("part::2/*.jpg", True),
        ("simplecache::a.tar", False),
        ("simplecache::s3://b/a.tar", False),
    ],
)
def test_a_chain_of_stores_is_left_alone_but_not_a_name_with_colons(
    path: str, is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(path) == (f"{tmp_path}/{path}" if is_local else path)


@pytest.mark.parametrize(
    "path", ["embedded", "a" * 300, "llava-hf/llava-1.5-7b-hf", "s3://bucket/model"]
)
def test_a_model_that_is_no_local_folder_keeps_its_name(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    assert build_spec(minimal(model={"path": path}), origin="x").model.path == path


# Round trip


@st.composite
def jobs(draw: st.DrawFn) -> JobSpec:
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
    ids = draw(st.lists(text.filter(lambda t: t != "questions"), min_size=1, unique=True))
    ask: list[dict[str, Any]] = [{"id": name, "prompt": draw(text)} for name in ids]
    if draw(st.booleans()):
        ask.append({"from": "questions", "max_new_tokens": draw(st.integers(1, 99))})
    paths = st.sampled_from(["/a", "s3://b/{0..9}.tar", "/yes", "/c d"])
    return build_spec(
        {
            "name": draw(text),
            "source": {
                "format": draw(st.sampled_from(["webdataset", "images"])),
                "path": draw(st.one_of(paths, st.lists(paths, min_size=1))),
                "keep": draw(st.lists(text)),
            },
            "ask": ask,
            "model": {"system_prompt": draw(st.none() | text)},
            "output": {"path": draw(paths), "prompts": draw(st.booleans())},
            "resources": {"generate": {"cpus": draw(st.none() | st.floats(0, 8))}},
            "max_failed_fraction": draw(st.floats(0, 1)),
        },
        origin="drawn",
    )


@settings(deadline=None)
@given(jobs())
def test_a_dumped_spec_loads_back_equal(job: JobSpec) -> None:
    assert build_spec(yaml12.load(dump_spec(job)), origin="dumped") == job


def test_a_dumped_spec_says_only_what_differs_from_the_defaults() -> None:
    assert yaml12.load(dump_spec(build_spec(minimal(), origin="x"))) == minimal()


# One line


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("s3://b/x.tar", "webdataset"),
        ("a/{00..09}.TGZ", "webdataset"),
        ("a/{00000..00009}", "webdataset"),
        ("a/{x.tar,y.tar}", "webdataset"),
        ("a/*.tar.gz", "webdataset"),
        ("a/train-*.parquet", "parquet"),
        ("s3://b/questions.jsonl.gz", "manifest"),
        ("llava_instruct.json", "manifest"),
        ("a/{x,y}/*.jpg", "images"),
        ("https://host/cat.png", "images"),
        ("nowhere", "images"),
        ("nowhere/*", "images"),
    ],
)
def test_the_format_is_guessed_from_the_name(source: str, kind: str) -> None:
    assert guess_format(source) == kind


@pytest.mark.parametrize("source", ["a" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_left_to_the_listing(source: str) -> None:
    assert guess_format(source) == "images"


def test_a_local_folder_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "set.v2" / "deep").mkdir(parents=True)
    assert guess_format(str(tmp_path / "set.v2")) == "images"
    for name, kind in (
        ("notes.json", "manifest"),
        ("a.png", "images"),
        ("b.parquet", "parquet"),
        ("0.tar", "webdataset"),
    ):
        (tmp_path / "set.v2" / "deep" / name).touch()
        assert guess_format(str(tmp_path / "set.v2")) == kind


def test_a_relative_image_root_means_the_folder_of_who_wrote_it(tmp_path: Path) -> None:
    spec = minimal()
    spec["source"] |= {"format": "parquet", "image_root": "photos"}
    assert build_spec(spec, origin="x").source.image_root == str(Path("photos").absolute())


def test_a_remote_folder_needs_a_word() -> None:
    with pytest.raises(SpecError, match="add --format webdataset, parquet, manifest or images"):
        guess_format("s3://bucket/photos/")


def test_question_ids_come_from_the_words_and_are_distinct() -> None:
    asks = question_asks(
        ["Is it red?", "is it red", "???", "Questions", "Is it red?", "Ist es süß"]
    )
    assert {ask["id"]: ask["prompt"] for ask in asks} == {
        "is-it-red-e949cf": "Is it red?",
        "is-it-red-6f5491": "is it red",
        "question-a03b22": "???",
        "question-9a7222": "Questions",
        "ist-es-süß": "Ist es süß",
    }


@settings(deadline=None)
@given(st.permutations(["Is it red?", "is it red", "Is it?", "???"]))
def test_question_ids_do_not_depend_on_the_order(questions: list[str]) -> None:
    ids = {ask["prompt"]: ask["id"] for ask in question_asks(questions)}
    assert ids == {ask["prompt"]: ask["id"] for ask in question_asks(sorted(questions))}


# Questions


@pytest.mark.parametrize(
    ("ask", "generate", "message"),
    [
        ({"choices": ["yes"]}, {}, "ask.0.choices: ['yes']: give two or more to choose from"),
        ({"choices": ["yes", True]}, {}, "ask.0.choices.1: True should be a string"),
        ({"choices": ["yes", "yes"]}, {}, "ask.0.choices: 'yes' is given twice"),
        ({"choices": ["yes", " no"]}, {}, "' no' has a space at an end; take it off"),
        (
            {"choices": ["yes", "no"], "temperature": 1.0},
            {},
            "ask.0: choices are not decoded: temperature has no effect; drop it",
        ),
        ({"length_normalise": True}, {}, "and there are none; drop it, or give choices"),
        ({"n": 3}, {}, "ask.0: n has no effect at temperature 0"),
        ({}, {"top_p": 0.5}, "generate.top_p: has no effect at temperature 0"),
        ({"temperature": 0}, {"temperature": 1, "n": 5}, "generate.n: has no effect"),
        ({}, {"temperature": 0.001}, "0.001 is neither 0 (always the likeliest token) nor 0.01"),
        ({"min_new_tokens": 100}, {}, "min_new_tokens is 100, max_new_tokens 64"),
        ({}, {"stop": "."}, "generate.stop: '.' should be a list"),
        ({"choice": ["a", "b"]}, {}, "did you mean choices?"),
        (
            {"choices": ["a", "b"], "json_schema": {}},
            {},
            "ask.0: choices are not decoded: json_schema has no effect",
        ),
        ({"json_schema": {}}, {"stop": ["}"]}, "json_schema says: stop would cut it or go on"),
        ({"json_schema": {}}, {"min_new_tokens": 3}, "json_schema says: min_new_tokens would"),
        ({"json_schema": "{}"}, {}, "ask.0.json_schema: '{}' should be a mapping"),
    ],
)
def test_what_cannot_be_meant_is_told_with_the_remedy(
    ask: dict[str, Any], generate: dict[str, Any], message: str
) -> None:
    entry = {"id": "a", "prompt": "A?", **ask}
    assert message in mistakes_of(ask=[entry], generate=generate)


def test_a_question_says_otherwise_than_generate() -> None:
    ask = [
        {"id": "a", "prompt": "A?", "temperature": 0, "stop": []},
        {"id": "b", "prompt": "B?", "top_k": 5, "n": 2},
        {"from": "questions", "choices": ["yes", "no"]},
    ]
    generate = {"temperature": 0.5, "n": 4, "stop": ["."]}
    job = build_spec(minimal(ask=ask, generate=generate), origin="x")
    decoded = [job.decoding(ask) for ask in job.ask]
    assert [(d.temperature, d.top_k, d.stop) for d in decoded] == [
        (0.0, 0, ()),
        (0.5, 5, (".",)),
        (0.5, 0, (".",)),
    ]
    assert [job.samples(ask) for ask in job.ask] == [1, 2, 1]


def test_choices_that_yaml_took_for_truth_are_text() -> None:
    text = "{id: a, prompt: A, choices: [yes, no]}"
    job = build_spec(minimal(ask=[yaml12.load(text)]), origin="x")
    assert job.ask[0].choices == ("yes", "no")
