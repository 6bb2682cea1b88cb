"""What cannot stand beside the answers that are there: each refusal names old, new and remedy."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.run import run_job
from pipeline.embedded import CHECKPOINT
from schemas.ask import AskPrompt
from schemas.errors import SpecError
from schemas.job import JobSpec
from tests.complete import complete_job

LIMITS = r"up to \d+ pixels and \d+ bytes, no truncated ones"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return complete_job(tmp_path_factory.mktemp("complete"), shards=1, images=2)


def refusal(job: JobSpec, part: str, changed: Any) -> str:
    old = getattr(job, part)
    new = changed if isinstance(old, tuple) else old.model_copy(update=changed)
    data = job.model_copy(update={part: new}).model_dump(by_alias=True)
    files = {path: path.read_bytes() for path in Path(job.output.path, "answers").iterdir()}
    with pytest.raises(SpecError) as error:
        run_job(JobSpec.model_validate(data), address=None, console=Console(file=io.StringIO()))
    assert {path: path.read_bytes() for path in files} == files
    return str(error.value)


@pytest.mark.parametrize(
    ("part", "changed", "told"),
    [
        (
            "ask",
            (AskPrompt(id="shape", prompt="which shape?"),),
            r"question 'shape': was 'what shape is present\? \(at most 64 tokens, [0-9a-f]{16}\)', "
            r"is now 'which shape\? \(at most 64 tokens, [0-9a-f]{16}\)'",
        ),
        ("generate", {"max_new_tokens": 9}, r"\(at most 64 tokens, .* \(at most 9 tokens, "),
        ("model", {"dtype": "bfloat16"}, r"model dtype: was 'float32', is now 'bfloat16'"),
        ("model", {"system_prompt": "Be short."}, r"model system_prompt: was '\w+', is now '\w+'"),
        (
            "source",
            {"decode": "fast"},
            rf"model pixels: was 'exact, {LIMITS}', is now 'fast, {LIMITS}'",
        ),
        ("source", {"where": "__key__ != 'x'"}, r"model where: was 'every row', is now "),
        ("source", {"keep": ("url",)}, r"other columns .* url: was None, is now string"),
        ("output", {"prompts": True}, r"other columns .* prompt: was None, is now string"),
    ],
)
def test_a_change_is_refused_before_anything_is_answered(
    complete: JobSpec, part: str, changed: Any, told: str
) -> None:
    text = refusal(complete, part, changed)
    assert re.search(told, text), text
    assert "Run it with --fork NEW_DST" in text
    assert re.search(r", or put (the old value|source.keep and output.prompts) back", text)


def test_other_weights_are_refused(complete: JobSpec, tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    text = refusal(complete, "model", {"path": str(tmp_path / "model")})
    assert re.search(r"model weights: was '[0-9a-f]{16}', is now '[0-9a-f]{16}'", text), text
