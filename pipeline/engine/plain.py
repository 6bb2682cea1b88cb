"""The plain engine: every question a row of its own, answered batch by batch.

It prefills an image anew for each question, and a batch waits for its longest answer. It is there
for models that cannot be packed (`choose.py`), through their own forward and transformers' cache.
A branch that continues another one is read from its start, like all others.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from pipeline.engine.look import alike, features_of, mismatch, no_room_for_image
from pipeline.engine.memory import Shortage, does_not_fit, within_memory
from pipeline.engine.padded import Row, decode_rows, score_rows
from pipeline.engine.placement import home_of
from pipeline.engine.request import Branch, ImagePixels, Outcome, Prefix, Request
from schemas.errors import DeviceOutOfMemory, GenerateError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

T = TypeVar("T")
Features = Mapping[str, torch.Tensor | GenerateError]
"""By the image's sha256: [tokens, hidden], or why there are none."""


@dataclass
class _Branch:
    """One (prefix + branch) of the call and the place its outcome goes to."""

    prefix: Prefix
    branch: Branch
    outcome: Outcome | None = None

    @property
    def token_ids(self) -> list[int]:
        return [*self.prefix.token_ids, *self.branch.token_ids]


class _Asked:
    """The branches of a request, those that have followed with them."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.branches = [_Branch(request.prefix, branch) for branch in request.branches]
        self._told = 0

    def grown(self) -> list[_Branch]:
        """What follows the branches that have got their outcome since the last time."""
        prefix, grow = self._request.prefix, self._request.grow
        if grow is None:
            return []
        first, count = self._told, len(self.branches)
        for number, branch in enumerate(self.branches[first:], first):
            following = grow(number, _settled(branch))
            self.branches += [_Branch(prefix, each) for each in following]
        self._told = count
        return self.branches[count:]


class PlainEngine:
    """Answers requests in left-padded batches of `batch_size`, longest prompts first.

    In float32 each greedy answer is token for token what transformers' `generate` gives for that
    prompt alone, whatever else is in the call (ties of the top two logits within rounding aside).
    Safe to call from several threads: calls take turns.

    `table`: float32 [3, 256] of `pixels.pixel_table`. There is no pad token: padding is zeros in
    embedding space, which no row attends to.
    """

    def __init__(
        self,
        model: "LlavaForConditionalGeneration",
        *,
        eos_token_ids: Sequence[int],
        table: np.ndarray,
        batch_size: int,
    ) -> None:
        self._model = model
        self._eos = frozenset(eos_token_ids)
        self._home = home_of(model)
        self._table = torch.from_numpy(table).to(self._home)
        self._batch_size = batch_size
        self._lock = threading.Lock()

    def submit(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """One outcome for each branch of each request, in the order of their numbers."""
        asked = [_Asked(request) for request in requests]
        with self._lock, torch.inference_mode():
            features = self._look(requests)
            todo = [branch for each in asked for branch in each.branches]
            while todo:
                todo.sort(key=lambda branch: len(branch.token_ids), reverse=True)
                for some in _apart(todo):
                    self._in_batches(
                        some, lambda batch: self._answer(batch, features), self._give_up
                    )
                todo = [branch for each in asked for branch in each.grown()]
        return [[_settled(branch) for branch in each.branches] for each in asked]

    def _look(self, requests: Sequence[Request]) -> Features:
        """The features of each distinct image, computed once."""
        distinct = {i.sha256: i for r in requests if r.branches for i in r.prefix.images}
        features: dict[str, torch.Tensor | GenerateError] = {}

        def look(images: Sequence[ImagePixels]) -> None:
            found = features_of(self._model, images, self._table)
            features.update(zip((i.sha256 for i in images), found, strict=True))

        def give_up(image: ImagePixels, shortage: Shortage) -> None:
            features[image.sha256] = no_room_for_image(image, self._home, shortage)

        for images in alike(distinct.values()):
            self._in_batches(images, look, give_up)
        return features

    def _answer(self, batch: Sequence[_Branch], features: Features) -> None:
        rows: list[tuple[_Branch, Row]] = []
        for branch in batch:
            embeds = self._embedded(branch, features)
            if isinstance(embeds, GenerateError):
                branch.outcome = embeds
            else:
                rows.append((branch, Row(embeds, branch.prefix.token_ids, branch.branch)))
        embedded = [row for _, row in rows]
        if embedded and embedded[0].branch.scored:
            score_rows(self._model, embedded, eos=self._eos)
        elif embedded:
            decode_rows(self._model, embedded, eos=self._eos)
        for branch, row in rows:
            branch.outcome = row.outcome

    def _embedded(self, branch: _Branch, features: Features) -> torch.Tensor | GenerateError:
        """The prompt's embeddings [tokens, hidden], features in place of its image tokens."""
        found = [features[image.sha256] for image in branch.prefix.images]
        for feature in found:
            if isinstance(feature, GenerateError):
                return feature
        tensors = [feature for feature in found if isinstance(feature, torch.Tensor)]
        token_ids = branch.token_ids
        ids = torch.tensor(token_ids, device=self._home)
        is_image = ids == self._model.config.image_token_id
        n_tokens = token_ids.count(self._model.config.image_token_id)
        n_features = sum(len(feature) for feature in tensors)
        if n_tokens != n_features:
            return mismatch(n_tokens, n_features)
        embeds: torch.Tensor = self._model.get_input_embeddings()(ids).to(self._home)
        if tensors:
            embeds[is_image] = torch.cat(tensors).to(embeds)
        return embeds

    def _in_batches(
        self,
        items: Sequence[T],
        run: Callable[[Sequence[T]], None],
        give_up: Callable[[T, Shortage], None],
    ) -> None:
        """Run items in batches; a batch that does not fit is halved, down to one item."""
        waiting = [items[i : i + self._batch_size] for i in range(0, len(items), self._batch_size)]
        while waiting:
            batch = waiting.pop(0)
            short = within_memory(functools.partial(run, batch), self._home)
            if short is None:
                continue
            if len(batch) == 1:
                give_up(batch[0], short)
            else:
                half = (len(batch) + 1) // 2
                waiting[:0] = [batch[:half], batch[half:]]

    def _give_up(self, branch: _Branch, shortage: Shortage) -> None:
        what = f"the row, with {len(branch.token_ids)} tokens of its prompt,"
        branch.outcome = DeviceOutOfMemory(does_not_fit(what, self._home, shortage))


def _apart(branches: Sequence[_Branch]) -> tuple[Sequence[_Branch], Sequence[_Branch]]:
    """Those that are asked, and those that are scored."""
    return (
        [each for each in branches if not each.branch.scored],
        [each for each in branches if each.branch.scored],
    )


def _settled(branch: _Branch) -> Outcome:
    if branch.outcome is None:
        raise RuntimeError(f"a branch of {len(branch.token_ids)} tokens was left without outcome")
    return branch.outcome
