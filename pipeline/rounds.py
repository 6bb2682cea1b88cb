"""Tasks to requests of the engine, and outcomes back to tasks.

Questions that share their images and a prefix (up to the last image token) are one request,
whatever rows they are of. What falls due while a request is at work and begins with its prefix
joins it, where it finds the prefix read, and the conversation that it goes on from; the rest is
asked in another round.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.asking import Asking
from pipeline.engine.request import Branch, Engine, ImagePixels, Outcome, Prefix, Request
from pipeline.talk import Said, Talk, Task
from pipeline.tokenise import alike

TokenIds = tuple[int, ...]
_Place = tuple[Task, int]
"""Where an outcome belongs: a task, and which of its branches."""


class Rounds:
    """`ask(talks)` settles all their tasks."""

    def __init__(
        self, engine: Engine, *, askings: Mapping[str, Asking], image_token_id: int
    ) -> None:
        self.engine, self._askings, self._image_token_id = engine, askings, image_token_id

    def ask(self, talks: Sequence[Talk]) -> None:
        due = [task for talk in talks for task in talk.due()]
        images: dict[str, ImagePixels] = {}
        while due:
            for task in due:
                for name, row in _with_images(task):
                    if name not in images:
                        images[name] = _image(row, name)
            groups = self._groups(due, images)
            submitted = self.engine.submit([group.request() for group in groups])
            for group, outcomes in zip(groups, submitted, strict=True):
                if not group.grows:
                    for number, outcome in enumerate(outcomes):
                        group.settle(number, outcome)
            due = [task for group in groups for task in group.left]

    def _groups(
        self, tasks: Iterable[Task], images: Mapping[str, ImagePixels]
    ) -> Sequence["_Group"]:
        by_prefix: dict[tuple[tuple[str, ...], TokenIds], list[Task]] = {}
        for task in tasks:
            prefix = self._prefix(task.prompt["token_ids"])
            names = tuple(name for name, _ in _with_images(task))
            by_prefix.setdefault((names, prefix), []).append(task)
        return [
            _Group(prefix, [images[name] for name in names], alike_tasks, self._askings)
            for (names, prefix), alike_tasks in by_prefix.items()
        ]

    def _prefix(self, ids: Sequence[int]) -> TokenIds:
        """Up to and including the last image token."""
        places = (i for i, token in enumerate(ids) if token == self._image_token_id)
        last = max(places, default=-1)
        return tuple(ids[: last + 1])


@dataclass
class _Group:
    """One request in the making, and while it is at work. `left`: what it could not take up."""

    prefix: TokenIds
    images: Sequence[ImagePixels]
    tasks: Sequence[Task]
    askings: Mapping[str, Asking]
    left: list[Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        talks = {id(task.talk): task.talk for task in self.tasks}.values()
        self._places: list[list[_Place]] = []
        self._branch_of: dict[tuple[int, Said], int] = {}
        self._with_choices: dict[int, list[Task]] = {}
        # A lone question becomes a part of the prefix: no choice of it reads it.
        self._is_alone = len({tuple(task.prompt["token_ids"]) for task in self.tasks}) == 1
        branches = self._added(self.tasks)
        self.grows = bool(self._with_choices) or any(talk.has_later for talk in talks)
        if not any(talk.has_chains for talk in talks):
            # What comes later goes on from a branch, and so begins alike.
            branches = self._with_shared_start(branches)
        self._branches = branches

    def request(self) -> Request:
        grow = self._grown if self.grows else None
        return Request(Prefix(self.prefix, self.images), self._branches, grow)

    def settle(self, number: int, outcome: Outcome) -> list[Task]:
        """Give it to all that asked the same; tells what is due then."""
        due: list[Task] = []
        for task, place in self._places[number]:
            task.outcomes[place] = outcome
            if None not in task.outcomes:
                due += task.talk.settle(task)
        return due

    def _grown(self, number: int, outcome: Outcome) -> Sequence[Branch]:
        waiting = self._with_choices.pop(number, [])
        due = self.settle(number, outcome)
        fitting = [task for task in due if self._begins_alike(task)]
        self.left += [task for task in due if not self._begins_alike(task)]
        self._is_alone = False
        return self._other_choices(waiting, number) + self._added(fitting)

    def _other_choices(self, tasks: Iterable[Task], number: int) -> list[Branch]:
        """Those behind the first, which has read the question for all of them."""
        numbers: dict[Branch, int] = {}
        for task in tasks:
            for place, branch in enumerate(self._branches_of(task)):
                if place:
                    self._add(task, place, replace(branch, continues=number), numbers)
        return list(numbers)

    def _begins_alike(self, task: Task) -> bool:
        n = len(self.prefix)
        ids = task.prompt["token_ids"]
        return len(ids) > n and tuple(ids[:n]) == self.prefix

    def _added(self, tasks: Iterable[Task]) -> list[Branch]:
        """The branches of tasks. Without chance, the same question gets the same answer."""
        numbers: dict[Branch, int] = {}
        for task in tasks:
            branches = self._branches_of(task)
            task.outcomes = [None] * len(branches)
            if task.prompt["choices"] is not None and not self._is_alone:
                longest = max(len(branch.token_ids) for branch in branches)
                first = replace(branches[0], later_tokens=longest - len(branches[0].token_ids))
                number = self._add(task, 0, first, numbers)
                self._with_choices.setdefault(number, []).append(task)
                continue
            for place, branch in enumerate(branches):
                number = self._add(task, place, branch, numbers)
                if place < len(task.samples):
                    self._branch_of[id(task.talk), task.keys[place]] = number
        return list(numbers)

    def _add(self, task: Task, place: int, branch: Branch, numbers: dict[Branch, int]) -> int:
        """Note where the outcome of a branch belongs; gives its number."""
        if branch not in numbers:
            numbers[branch] = len(self._places)
            self._places.append([])
        self._places[numbers[branch]].append((task, place))
        return numbers[branch]

    def _branches_of(self, task: Task) -> list[Branch]:
        talk, asking = task.talk, self.askings[task.prompt["unit"]]
        branches = asking.branches(
            task.prompt, talk.place, start=len(self.prefix), samples=task.samples
        )
        if not talk.has_later and task.prompt["turn"] == 0:
            return branches
        parent = talk.parent(task)
        continues = self._branch_of.get((id(talk), parent)) if parent else None
        later = talk.later_tokens(task)
        return [replace(each, continues=continues, later_tokens=later) for each in branches]

    def _with_shared_start(self, branches: list[Branch]) -> list[Branch]:
        """What all branches begin with becomes part of the prefix, and is read once."""
        unscored = [tuple(_unscored(branch)) for branch in branches]
        shared = alike(min(unscored), max(unscored))
        if len(branches) == 1 or shared <= 1:
            return branches
        # A branch keeps the token at which it is answered.
        self.prefix = (*self.prefix, *branches[0].token_ids[: shared - 1])
        return [replace(b, token_ids=b.token_ids[shared - 1 :]) for b in branches]


def _unscored(branch: Branch) -> Sequence[int]:
    return branch.token_ids[: len(branch.token_ids) - branch.scored]


def _with_images(task: Task) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """The name and the columns of each of its images. One of several may have other pixels than it
    has alone, and so has another name."""
    row = task.talk.row
    if not row["more_images"]:
        return [(row["image_sha256"], row)]
    return [(f"{each['image_sha256']} of several", each) for each in (row, *row["more_images"])]


def _image(row: Mapping[str, Any], name: str) -> ImagePixels:
    shape = row["pixels_shape"] or [-1]
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(shape).copy()
    return ImagePixels(pixels, name, (row["image_width"], row["image_height"]))
