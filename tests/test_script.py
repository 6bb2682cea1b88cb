"""What entries of `ask` say about a row."""

from typing import Any

import pytest

from pipeline.fingerprint import question_fingerprints
from pipeline.script import columns_of, scripts_of, with_needed
from pipeline.sources.base import Turn
from schemas.errors import ConditionFailed, SpecError
from schemas.job import JobSpec
from schemas.presets import PRESETS


def job_of(*ask: dict[str, Any], **parts: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "source": {"format": "images", "path": "x"},
            "ask": ask,
            "output": {"path": "y"},
            **parts,
        }
    )


ANIMAL = {"id": "animal", "prompt": "Which animal?", "choices": ("dog", "cat")}
BREED = {"id": "breed", "prompt": "Of which breed is the {{ answers.animal }}?"}


def question(job: JobSpec, unit: str, *, row: Any = None, answers: Any = None, index: int = 0):
    script = scripts_of(job)[unit]
    return script.question(0, row=row or {}, answers=answers or {}, place=["a.tar", index])


@pytest.mark.parametrize(
    ("ask", "asked"),
    [
        (
            {"prompt": "What is it?", "preset": "short-answer"},
            "What is it?\nAnswer the question using a single word or phrase.",
        ),
        ({"prompt": "Is it?", "preset": "yes-no"}, "Is it?\nPlease answer yes or no."),
        (
            {"prompt": "What?", "preset": "multiple-choice", "choices": ("a cat", "a dog")},
            "What?\nA. a cat\nB. a dog\n"
            "Answer with the option's letter from the given choices directly.",
        ),
    ],
)
def test_a_preset_follows_the_question(ask: dict[str, Any], asked: str) -> None:
    assert question(job_of({"id": "q", **ask}), "q") == asked


def test_a_rows_own_question_gets_the_words_of_its_preset() -> None:
    script = scripts_of(job_of({"from": "questions", "preset": "short-answer"}))["questions"]
    assert script.worded("Who?").startswith("Who?\nAnswer the question")


@pytest.mark.parametrize("name", [n for n, preset in PRESETS.items() if len(preset.prompts) > 1])
def test_of_several_prompts_one_is_drawn_for_each_row(name: str) -> None:
    ask = {"id": "q", "preset": name}
    drawn = [question(job_of(ask), "q", index=n) for n in range(200)]
    assert drawn == [question(job_of(ask), "q", index=n) for n in range(200)]
    counts = [drawn.count(prompt) for prompt in PRESETS[name].prompts]  # type: ignore[index]
    assert sum(counts) == 200
    assert min(counts) > 100 / len(counts)
    other = job_of(ask, generate={"seed": 1})
    assert [question(other, "q", index=n) for n in range(200)] != drawn


def test_examples_are_turns() -> None:
    shots = [{"question": "2 + 2?", "answer": "4"}]
    script = scripts_of(job_of({"id": "q", "prompt": "x", "shots": shots}))["q"]
    assert script.shots == (Turn("user", "2 + 2?"), Turn("assistant", "4"))


def test_a_question_may_look_at_an_earlier_answer() -> None:
    job = job_of(ANIMAL, BREED)
    assert scripts_of(job)["breed"].needs == ("animal",)
    assert question(job, "breed", answers={"animal": "dog"}) == "Of which breed is the dog?"


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        ("animal == 'dog'", None),
        ("animal == 'dog' and width > 10", None),
        ("animal in ['cat', 'cow']", "does not hold: animal in"),
        ("width < 10", "does not hold"),
        ("height > 3", "does not hold"),
    ],
)
def test_a_condition_is_over_answers_and_columns(condition: str, reason: str | None) -> None:
    script = scripts_of(job_of(ANIMAL, {**BREED, "when": condition}))["breed"]
    said = script.unasked(row={"width": 20}, answers={"animal": "dog"})
    assert said is None if reason is None else reason in str(said)


def test_a_condition_that_does_not_fit_a_value_fails_the_row() -> None:
    script = scripts_of(job_of({"id": "q", "prompt": "x", "when": "width > 3"}))["q"]
    with pytest.raises(ConditionFailed, match=r"ask.0.when 'width > 3' cannot be evaluated"):
        script.unasked(row={"width": "wide"}, answers={})


@pytest.mark.parametrize(
    ("asks", "reason"),
    [
        ([BREED, ANIMAL], "ask.0: looks at the answer to 'animal', which is asked later"),
        ([ANIMAL, {"id": "b", "prompt": "{{ answers.animl }}"}], "did you mean 'animal'?"),
        ([{"id": "b", "prompt": "{{ answers.b }}"}], "asked later"),
        ([{"id": "b", "prompt": "{{ answers.c }}"}], "nothing is asked before it"),
        ([{"id": "b", "prompt": "x", "when": "animal =="}], "ask.0.when: 'animal ==' is no"),
        ([{"id": "b", "turns": ("x", "{{ y")}], r"ask.0.turns: '\{\{ y' is no template"),
    ],
)
def test_what_looks_at_nothing_is_a_mistake(asks: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        scripts_of(job_of(*asks))


def test_the_columns_are_those_of_prompts_and_conditions() -> None:
    first = {"id": "a", "prompt": "{{ title }} {{ hint | d('') }}", "when": "width > 3"}
    scripts = scripts_of(job_of(ANIMAL, {**first, "when": "width > 3 and animal == 'dog'"}))
    assert columns_of(scripts) == {"title", "hint", "width"}
    assert scripts["a"].required == {"title", "width"}


def test_what_is_needed_comes_with_what_needs_it() -> None:
    last = {"id": "last", "prompt": "{{ answers.breed }}"}
    scripts = scripts_of(job_of(ANIMAL, BREED, {"id": "other", "prompt": "x"}, last))
    assert with_needed(["last"], scripts) == ["animal", "breed", "last"]
    assert with_needed(["other"], scripts) == ["other"]


def prints(*ask: dict[str, Any], **parts: Any) -> dict[str, str]:
    return question_fingerprints(job_of(*ask, **parts))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Of what breed is the {{ answers.animal }}?"},
        {"when": "animal == 'dog'"},
        {"shots": ({"question": "a", "answer": "b"},)},
        {"preset": "short-answer"},
    ],
)
def test_what_is_asked_decides_the_fingerprint(change: dict[str, Any]) -> None:
    assert prints(ANIMAL, BREED)["breed"] != prints(ANIMAL, {**BREED, **change})["breed"]


def test_a_question_that_looks_at_another_is_changed_with_it() -> None:
    other = {**ANIMAL, "choices": ("dog", "cow")}
    old, new = prints(ANIMAL, BREED), prints(other, BREED)
    assert old["animal"] != new["animal"]
    assert old["breed"] != new["breed"]


def test_the_seed_decides_where_a_prompt_is_drawn() -> None:
    drawn, written = {"id": "q", "preset": "brief-caption"}, {"id": "p", "prompt": "x"}
    old, new = (prints(drawn, written, generate={"seed": seed}) for seed in (0, 1))
    assert old["q"] != new["q"]
    assert old["p"] == new["p"]
