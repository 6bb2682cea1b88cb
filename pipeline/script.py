"""What an entry of `ask` says about a row: its questions, turn by turn, and when they are asked.

One `Script` for each unit of coverage, made of the spec alone. Knows no model and no tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from pipeline.engine.noise import noise_key
from pipeline.sources.base import Turn
from pipeline.template import Template, template_of
from pipeline.where import Where, parse_where
from schemas.ask import Ask, AskPrompt, AskRow
from schemas.errors import ConditionFailed, FilterFailed, SpecError
from schemas.job import JobSpec

Answers = Mapping[str, str]
"""Of entries of `ask` about one row, by their ids."""


@dataclass(frozen=True)
class Script:
    """`turns`: the templates of each, of which one is drawn for a row; the row's own question where
    there are none. `needs`: units whose answers are looked at, all of them asked earlier."""

    ask: Ask
    unit: str
    key: str
    seed: int
    turns: tuple[tuple[Template, ...], ...]
    when: Where | None
    needs: tuple[str, ...]

    @property
    def is_talk(self) -> bool:
        """Whether any of its questions waits for an answer."""
        return bool(self.needs) or len(self.turns) > 1

    @property
    def columns(self) -> frozenset[str]:
        """Of the row, as far as they are looked at."""
        names = {name for each in self._templates for name in each.columns}
        return frozenset(names | self._compared)

    @property
    def required(self) -> frozenset[str]:
        """Columns that cannot be meant to be missing everywhere."""
        named = {name for each in self._templates for name in each.required}
        return frozenset(named | self._compared)

    @property
    def shots(self) -> tuple[Turn, ...]:
        """The examples as turns."""
        return tuple(
            Turn(role, text)
            for shot in self.ask.shots
            for role, text in (("user", shot.question), ("assistant", shot.answer))
        )

    def question(
        self, turn: int, *, row: Mapping[str, object], answers: Answers, place: Sequence[object]
    ) -> str:
        """What is asked about a row. `place`: its shard and number. Raises TemplateFailed."""
        templates = self.turns[turn]
        drawn = 0
        if len(templates) > 1:
            drawn = noise_key([self.seed, *place, self.unit, turn]) % len(templates)
        return self.worded(templates[drawn].render(row, answers))

    def worded(self, question: str) -> str:
        """The question with what its preset puts behind it."""
        lines = [question]
        if self.ask.words.lists_choices and self.ask.choices and self.ask.options:
            pairs = zip(self.ask.options, self.ask.choices, strict=True)
            lines += [f"{option}. {choice}" for option, choice in pairs]
        return "\n".join([*lines, *filter(None, [self.ask.words.ending])])

    def unasked(self, *, row: Mapping[str, object], answers: Answers) -> str | None:
        """Why it is not asked about a row, if it is not. Raises ConditionFailed."""
        if self.when is None:
            return None
        (holds,) = self.when.holds([{**row, **answers}])
        if isinstance(holds, FilterFailed):
            raise ConditionFailed(str(holds))
        return None if holds else f"{self.when.key} does not hold: {self.when.text}"

    @property
    def _templates(self) -> list[Template]:
        return [template for templates in self.turns for template in templates]

    @property
    def _compared(self) -> set[str]:
        """Columns that `when` looks at."""
        return self.when.columns - {*self.needs} if self.when else set()


def scripts_of(job: JobSpec) -> dict[str, Script]:
    """By unit. Raises SpecError for templates and conditions that cannot be understood, and for
    those that look at an answer that is not there by then."""
    scripts: dict[str, Script] = {}
    ids = {ask.id for ask in job.ask if isinstance(ask, AskPrompt)}
    for number, (unit, ask) in enumerate(zip(job.units, job.ask, strict=True)):
        key = f"ask.{number}"
        turns = tuple(_templates(ask, key=key))
        when = parse_where(ask.when, key=f"{key}.when") if ask.when else None
        named = {id: key for templates in turns for each in templates for id in each.answers}
        if when is not None:
            named |= dict.fromkeys(when.columns & ids, when.key)
        for id, where in named.items():
            _check_is_earlier(id, ids & scripts.keys(), ids, key=where)
        needs = tuple(each for each in scripts if each in named)
        scripts[unit] = Script(ask, unit, key, job.generate.seed, turns, when, needs)
    return scripts


def _templates(ask: Ask, *, key: str) -> list[tuple[Template, ...]]:
    if isinstance(ask, AskRow):
        return []
    if ask.words.prompts:
        return [tuple(map(template_of, ask.words.prompts))]
    try:
        return [(template_of(text),) for text in ask.texts]
    except SpecError as error:
        raise SpecError(f"{key}.{'turns' if ask.turns else 'prompt'}: {error}") from error


def _check_is_earlier(id: str, earlier: set[str], ids: set[str], *, key: str) -> None:
    if id in earlier:
        return
    if id in ids:
        raise SpecError(f"{key}: looks at the answer to {id!r}, which is asked later; move it up")
    near = get_close_matches(id, earlier, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(sorted(earlier))}"
    raise SpecError(
        f"{key}: looks at the answer to {id!r}, and no entry of ask has that id; "
        f"{hint if earlier else 'nothing is asked before it'}"
    )


def columns_of(scripts: Mapping[str, Script]) -> frozenset[str]:
    """The columns of a row that any of them looks at."""
    return frozenset(name for script in scripts.values() for name in script.columns)


def with_needed(units: Sequence[str], scripts: Mapping[str, Script]) -> list[str]:
    """The units and those whose answers they look at, each behind what it needs."""
    wanted = set(units)
    for unit in reversed(list(scripts)):
        if unit in wanted:
            wanted.update(scripts[unit].needs)
    return [unit for unit in scripts if unit in wanted]
