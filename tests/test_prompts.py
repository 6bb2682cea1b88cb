"""What is asked, checked before a job begins."""

from pathlib import Path
from typing import Any

import pytest

from jobs.plan import plan
from pipeline.coverage import Coverage, Ranges
from pipeline.script import columns_of, scripts_of
from pipeline.sources import open_source
from pipeline.versions import ALL_STAND
from schemas.errors import SpecError
from schemas.job import JobSpec
from tests.formats import KINDS, source_of, write_sources
from tests.lines import tables_read, unfolded
from tests.shards import image_bytes
from tests.whole_jobs import job_of


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder, [image_bytes()] * 9)
    return folder


def job(folder: Path, kind: str, *ask: dict[str, Any], **parts: Any) -> JobSpec:
    return job_of(
        folder, folder / "out", source=source_of(kind, str(folder)), ask=list(ask), **parts
    )


def column_of(kind: str) -> str:
    return "__key__" if kind == "images" else "caption"


@pytest.mark.parametrize("kind", KINDS)
def test_columns_reach_the_prompts_of_every_format(sources: Path, kind: str) -> None:
    asks = job(sources, kind, {"id": "q", "prompt": f"Is it {{{{ {column_of(kind)} }}}}?"})
    planned = plan(asks)
    rows = [
        row
        for table in tables_read(asks, planned.work(Coverage(), ALL_STAND), keep=planned.keep)
        for row in unfolded(table)
        if row["source_index"] is not None and not row["error"]
    ]
    assert rows
    assert all(f'"{column_of(kind)}"' in row["columns"] for row in rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"prompt": "Is it {{ captoin }}?"}, "ask.1: column 'captoin' is in none of the first"),
        ({"prompt": "Is it {{ row['a b'] }}?"}, r"row\['a b'\] \| default"),
        ({"prompt": "Is it?", "when": "captoin == 'x'"}, "ask.1: column 'captoin'"),
    ],
)
def test_a_column_that_no_row_has_is_a_mistake(
    sources: Path, kind: str, keys: dict[str, str], key: str
) -> None:
    asks = job(sources, kind, {"id": "a", "prompt": "What?"}, {"id": "q", **keys})
    with pytest.raises(SpecError, match=key):
        plan(asks)


def test_a_column_that_may_be_missing_is_none(sources: Path) -> None:
    text = "Is it {{ hint | default('big') }}?"
    plan(job(sources, "webdataset", {"id": "q", "prompt": text}))


def test_looking_at_the_first_rows_fetches_no_image(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "http://127.0.0.1:9/x.png", "title": "Sea"}')
    source = {"format": "manifest", "path": f"{tmp_path}/rows.jsonl"}
    ask = [{"id": "q", "prompt": "Is it the {{ title }}?"}]
    plan(job_of(tmp_path, tmp_path / "out", source=source, ask=ask))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"model": {"chat_template": "vicunia"}}, "model.chat_template: 'vicunia' is neither"),
        ({"ask": [{"id": "a", "turns": ["x", "<image>y"]}]}, r"ask\.0\.turns\.1: .* holds <image>"),
        (
            {
                "ask": [
                    {
                        "id": "a",
                        "prompt": "x",
                        "shots": [{"question": "<image>", "answer": "y"}],
                    }
                ]
            },
            r"ask\.0\.shots\.0: .* holds <image>",
        ),
        ({"ask": [{"id": "a", "prompt": "{{ x"}]}, r"ask\.0\.prompt: .* is no template"),
    ],
)
def test_what_would_fail_in_every_row_is_refused(
    sources: Path, parts: dict[str, Any], reason: str
) -> None:
    ask = parts.pop("ask", [{"id": "q", "prompt": "x"}])
    with pytest.raises(SpecError, match=reason):
        plan(job(sources, "images", *ask, **parts))


def test_fields_are_those_that_are_looked_at_and_no_others(sources: Path) -> None:
    asks = job(sources, "webdataset", {"id": "q", "prompt": "{{ caption }}"})
    source = open_source(asks.source, fields=columns_of(scripts_of(asks)))
    first = next(iter(source.read(source.list()[0], skip=Ranges())))
    assert set(first.fields) == {"caption"}
