"""A row's questions while they are answered: what was said so far, and what can be asked next.

    Task    one question of one turn that is asked as a whole: all its samples, or one sample of a
            later turn, which goes on from that sample's answer
    Talk    the tasks of one row; settling one tells which others are due

A later turn, and a question that looks at earlier answers, is worded, rendered and tokenised here,
once these are known; what it waits for in vain is skipped. Knows no engine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.asking import Asking, Columns, unasked
from pipeline.engine.request import Outcome
from pipeline.entries import Entry, fail, skip, waiting, word
from pipeline.script import Script
from pipeline.sources.base import Turn
from pipeline.tokenise import Tokeniser
from schemas.errors import PromptError
from schemas.tables import EARLIER_FAILED, NOT_ASKED, error_of

ABOUT_A_TURN = 8
"""Tokens that a conversation has around question and answer, about."""

Said = tuple[str | None, int, int]
"""question_id, turn, sample_number"""


@dataclass(eq=False)
class Task:
    """`prompt`: a PROMPT struct, of its own. `outcomes`: of its branches, as they come.
    `columns`: of its answers, once it is settled, one for each of `samples`."""

    talk: "Talk"
    prompt: Entry
    samples: Sequence[int]
    outcomes: list[Outcome | None] = field(default_factory=list)
    columns: Sequence[Columns] | None = None

    @property
    def keys(self) -> list[Said]:
        return [(self.prompt["question_id"], self.prompt["turn"], n) for n in self.samples]


@dataclass(frozen=True)
class Scene:
    """What all talks of a job share. `tokeniser`: null where no question is a later one."""

    askings: Mapping[str, Asking]
    scripts: Mapping[str, Script]
    tokeniser: Tokeniser | None


class Talk:
    """`row`, `line`: of PREPARED. `tasks`: all of them, in the order of the answer table."""

    def __init__(self, scene: Scene, row: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        self.row, self.line, self._scene = row, line, scene
        self.tasks = [task for prompt in line["prompts"] for task in self._tasks(prompt)]
        self._said: dict[Said, Columns] = {}
        self._asked: dict[Said, Entry] = {}
        self._later = [task for task in self.tasks if _is_later(task.prompt)]

    @property
    def place(self) -> list[object]:
        """Its shard, and its number there."""
        return [self.row["source_uri"], self.line["source_index"]]

    @property
    def has_chains(self) -> bool:
        """Whether a question waits for the answer to another one."""
        return any(task.prompt["turn"] == 0 for task in self._later)

    @property
    def has_later(self) -> bool:
        return bool(self._later)

    def due(self) -> list[Task]:
        """What is asked first."""
        for task in self.tasks:
            if task.prompt["status"] is not None:
                self._note(task, [unasked(task.prompt)] * len(task.samples))
        now = [t for t in self.tasks if t.columns is None and not _is_later(t.prompt)]
        return now + self._due_later()

    def settle(self, task: Task) -> list[Task]:
        """Note the outcomes of a task, which are all there; gives what is due then."""
        outcomes = [outcome for outcome in task.outcomes if outcome is not None]
        asking = self._scene.askings[task.prompt["unit"]]
        self._note(task, list(asking.answers(task.prompt, outcomes)))
        return self._due_later() if self._later else []

    def parent(self, task: Task) -> Said | None:
        """The answer that a task goes on from."""
        turn = task.prompt["turn"]
        return (task.prompt["question_id"], turn - 1, task.samples[0]) if turn else None

    def later_tokens(self, task: Task) -> int:
        """Of what will be said behind its answer, about."""
        tokeniser, unit = self._scene.tokeniser, task.prompt["unit"]
        if tokeniser is None:
            return 0
        later = {
            t.prompt["turn"]: t.prompt
            for t in self._later
            if t.prompt["unit"] == unit and t.prompt["turn"] > task.prompt["turn"]
        }
        asked = sum(tokeniser.tokens_of(p["question"] or "") for p in later.values())
        said: int = sum(p["max_new_tokens"] for p in later.values())
        return asked + said + ABOUT_A_TURN * len(later)

    def _tasks(self, prompt: Entry) -> list[Task]:
        if prompt["unit"] is None:
            return [Task(self, prompt, range(1))]
        samples = self._scene.askings[prompt["unit"]].samples
        if not prompt["turn"]:
            return [Task(self, prompt, samples)]
        return [Task(self, dict(prompt), (number,)) for number in samples]

    def _note(self, task: Task, columns: Sequence[Columns]) -> None:
        task.columns = columns
        for key, each in zip(task.keys, columns, strict=True):
            self._said[key] = each
            self._asked[key] = task.prompt

    def _due_later(self) -> list[Task]:
        """Those that wait for nothing any more; what waits in vain is settled."""
        found: list[Task] = []
        is_new = True
        while is_new:
            is_new = False
            for task in list(self._later):
                if not all(key in self._said for key in self._needs(task)):
                    continue
                self._later.remove(task)
                self._prepare(task)
                if task.prompt["status"] is None:
                    found.append(task)
                else:
                    self._note(task, [unasked(task.prompt)] * len(task.samples))
                    is_new = True
        return found

    def _needs(self, task: Task) -> list[Said]:
        """Of a question that it looks at, the last turn's first sample."""
        scripts, parent = self._scene.scripts, self.parent(task)
        needed = [
            (unit, len(scripts[unit].turns) - 1, 0) for unit in scripts[task.prompt["unit"]].needs
        ]
        return needed + ([parent] if parent else [])

    def _prepare(self, task: Task) -> None:
        """Word, render and tokenise it, or say why it is not asked."""
        prompt, tokeniser = task.prompt, self._scene.tokeniser
        assert tokeniser is not None
        script = self._scene.scripts[prompt["unit"]]
        self._skip_in_vain(task)
        if prompt["status"] is None and script.needs:
            columns = self.line["columns"]
            row = json.loads(columns) if columns else {}
            answers = {key[0]: self._said[key].get("answer") for key in self._needs(task)}
            known = {str(id): text for id, text in answers.items() if text is not None}
            word(prompt, script, row=row, answers=known, place=self.place)
        if prompt["status"] is not None:
            return
        images = [self.row, *(self.row["more_images"] or ())]
        sizes = [(image["image_width"], image["image_height"]) for image in images]
        try:
            prompt["prompt"] = tokeniser.render(
                prompt["question"], self._conversation(task), script.shots, len(sizes)
            )
        except PromptError as error:
            fail(prompt, error_of(error))
            return
        places = [tokeniser.image_tokens.of(size, among=len(sizes)) for size in sizes]
        tokeniser.placing(*places).fill_in(prompt, options=script.ask.options)

    def _skip_in_vain(self, task: Task) -> None:
        """Where an answer is missing that it looks at. One that was not asked for is null in
        `when`; a turn is not asked then, nor a prompt that names it."""
        script = self._scene.scripts[task.prompt["unit"]]
        named = {id for templates in script.turns for each in templates for id in each.answers}
        for key in self._needs(task):
            said = self._said[key]
            if said["status"] == "ok":
                continue
            what = f"the answer to {key[0]!r}" + (f", turn {key[1]}," if key[1] else "")
            if said["status"] == "failed" or said["error_class"] == EARLIER_FAILED:
                skip(task.prompt, EARLIER_FAILED, f"{what} is missing: {said['error_class']}")
                return
            if key == self.parent(task) or key[0] in named:
                skip(task.prompt, NOT_ASKED, f"{what} was not asked for: {said['error_class']}")
                return

    def _conversation(self, task: Task) -> tuple[Turn, ...]:
        """What was said before: in the row, then in the turns so far."""
        said = [Turn(t["role"], t["content"]) for t in self.line["conversation"] or ()]
        for turn in range(task.prompt["turn"]):
            key = (task.prompt["question_id"], turn, task.samples[0])
            said.append(Turn("user", self._asked[key]["question"]))
            said.append(Turn("assistant", self._said[key]["answer"]))
        return tuple(said)


def _is_later(prompt: Entry) -> bool:
    return bool(prompt["is_later"] and waiting([prompt]))
