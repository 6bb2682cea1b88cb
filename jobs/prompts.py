"""What is asked, looked at before work starts: nothing here should fail in every row.

The first rows of the source are read for it where prompts or conditions look at columns; no image
is fetched or decoded.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.coverage import Ranges
from pipeline.engine.checkpoint import family_of, open_checkpoint
from pipeline.formats import IMAGE_TOKEN, given_template
from pipeline.script import Script, columns_of, scripts_of
from pipeline.sources import open_source
from pipeline.sources.base import Sample, Shard
from pipeline.sources.fetch import Unfetched
from schemas.ask import AskPrompt
from schemas.errors import SpecError, StoreUnavailable
from schemas.job import JobSpec

FIRST_ROWS = 8


def check_prompts(job: JobSpec, shards: Sequence[Shard]) -> None:
    """Raises SpecError for what is no template or no condition, looks at a column that is not
    there, holds an image mark, or leaves no room in the model's context."""
    scripts = scripts_of(job)
    given_template(job.model.chat_template)
    _check_texts(job)
    _check_length(job)
    if any(script.is_talk for script in scripts.values()):
        _check_may_talk(job)
    if columns := columns_of(scripts):
        source = open_source(job.source, fetcher=Unfetched(job.source), fields=columns)
        _check_columns(scripts, list(_first(source, shards)))


def _first(source: Any, shards: Sequence[Shard]) -> Iterator[Sample]:
    """The first rows that can be read, as far as the store gives them."""
    samples = (s for shard in shards for s in source.read(shard, skip=Ranges()))
    try:
        yield from itertools.islice((s for s in samples if s.error is None), FIRST_ROWS)
    except StoreUnavailable:
        # The run will try again, and say so.
        return


def _check_columns(scripts: Mapping[str, Script], rows: Sequence[Sample]) -> None:
    there = {name for row in rows for name, value in row.fields.items() if value is not None}
    for script in scripts.values():
        for name in sorted(script.required - there) if rows else ():
            raise SpecError(
                f"{script.key}: column {name!r} is in none of the first {len(rows)} rows of the "
                "source; correct the name, or write {{ "
                + (name if name.isidentifier() else f"row[{name!r}]")
                + " | default('') }} where most rows lack it"
            )


def _check_may_talk(job: JobSpec) -> None:
    family = family_of(open_checkpoint(job.model))
    if not family.is_fast:
        raise SpecError(
            f"ask: turns, and prompts and conditions over earlier answers, do not work with a "
            f"{family.architecture}, whose prompts its processor reads only with the image; ask "
            "them in a later run, over a table with the first answers as a column"
        )


def _check_texts(job: JobSpec) -> None:
    texts = {"model.system_prompt": job.model.system_prompt or ""}
    for number, ask in enumerate(job.ask):
        if isinstance(ask, AskPrompt):
            for turn, text in enumerate(ask.texts):
                texts[f"ask.{number}.{f'turns.{turn}' if ask.turns else 'prompt'}"] = text
        for place, choice in enumerate(ask.choices or ()):
            texts[f"ask.{number}.choices.{place}"] = choice
        for place, shot in enumerate(ask.shots):
            texts[f"ask.{number}.shots.{place}"] = f"{shot.question}\n{shot.answer}"
    for key, text in texts.items():
        if IMAGE_TOKEN in text:
            raise SpecError(
                f"{key}: {text!r} holds {IMAGE_TOKEN}; leave it out: the image is put where the "
                "model's format wants it"
            )


def _check_length(job: JobSpec) -> None:
    checkpoint = open_checkpoint(job.model)
    context = checkpoint.config.get("text_config", {}).get("max_position_embeddings")
    longest = max(1 if a.choices else job.decoding(a).max_new_tokens for a in job.ask)
    if context is not None and longest >= context:
        raise SpecError(
            f"max_new_tokens: {longest} is no less than the context of {job.model.path}, {context} "
            "tokens, which holds the prompt as well; lower it"
        )
