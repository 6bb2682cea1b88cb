"""The plain engine: every question a row of its own, answered batch by batch.

It prefills an image anew for each question, and a batch waits for its longest answer. It is there
for models that cannot be packed (`choose.py`), through their own forward and transformers' cache.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from pipeline.engine.greedy import Row, decode_rows
from pipeline.engine.look import mismatch
from pipeline.engine.memory import does_not_fit, is_out_of_memory, release_cached
from pipeline.engine.pixels import normalised
from pipeline.engine.request import ImagePixels, Outcome, Prefix, Request
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
    token_ids: list[int]
    max_new_tokens: int
    outcome: Outcome | None = None


class PlainEngine:
    """Answers requests greedily in left-padded batches of `batch_size`, longest prompts first.

    In float32 each answer is token for token what transformers' `generate` gives for that prompt
    alone, whatever else is in the call (ties of the top two logits within rounding aside). Safe to
    call from several threads: calls take turns.

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
        self._table = torch.from_numpy(table).to(model.device)
        self._batch_size = batch_size
        self._lock = threading.Lock()

    def submit(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """One outcome for each branch of each request, in their order."""
        asked = [
            [
                _Branch(r.prefix, [*r.prefix.token_ids, *b.token_ids], b.max_new_tokens)
                for b in r.branches
            ]
            for r in requests
        ]
        with self._lock, torch.inference_mode():
            features = self._look(requests)
            todo = sorted(
                (branch for group in asked for branch in group),
                key=lambda branch: len(branch.token_ids),
                reverse=True,
            )
            self._in_batches(todo, lambda batch: self._answer(batch, features), _give_up)
        return [[_settled(branch) for branch in group] for group in asked]

    def _look(self, requests: Sequence[Request]) -> Features:
        """The features of each distinct image, computed once."""
        distinct = {i.sha256: i for r in requests if r.branches for i in r.prefix.images}
        features: dict[str, torch.Tensor | GenerateError] = {}

        def look(images: Sequence[ImagePixels]) -> None:
            stacked = torch.from_numpy(np.stack([image.pixels for image in images]))
            pixels = normalised(stacked, self._table).to(self._model.dtype)
            found = self._model.get_image_features(pixel_values=pixels).pooler_output
            features.update(zip((i.sha256 for i in images), found, strict=True))

        def give_up(image: ImagePixels, error: GenerateError) -> None:
            features[image.sha256] = error

        by_shape: dict[tuple[int, ...], list[ImagePixels]] = {}
        for image in distinct.values():
            by_shape.setdefault(image.pixels.shape, []).append(image)
        for images in by_shape.values():
            self._in_batches(images, look, give_up)
        return features

    def _answer(self, batch: Sequence[_Branch], features: Features) -> None:
        rows: list[tuple[_Branch, Row]] = []
        for branch in batch:
            embeds = self._embedded(branch, features)
            if isinstance(embeds, GenerateError):
                branch.outcome = embeds
            else:
                rows.append((branch, Row(embeds, branch.max_new_tokens)))
        if rows:
            decode_rows(self._model, [row for _, row in rows], eos=self._eos)
        for branch, row in rows:
            branch.outcome = row.outcome

    def _embedded(self, branch: _Branch, features: Features) -> torch.Tensor | GenerateError:
        """The prompt's embeddings [tokens, hidden], features in place of its image tokens."""
        found = [features[image.sha256] for image in branch.prefix.images]
        for feature in found:
            if isinstance(feature, GenerateError):
                return feature
        tensors = [feature for feature in found if isinstance(feature, torch.Tensor)]
        ids = torch.tensor(branch.token_ids, device=self._model.device)
        is_image = ids == self._model.config.image_token_id
        n_tokens = branch.token_ids.count(self._model.config.image_token_id)
        n_features = sum(len(feature) for feature in tensors)
        if n_tokens != n_features:
            return mismatch(n_tokens, n_features)
        embeds: torch.Tensor = self._model.get_input_embeddings()(ids)
        if tensors:
            embeds[is_image] = torch.cat(tensors).to(embeds.dtype)
        return embeds

    def _in_batches(
        self,
        items: Sequence[T],
        run: Callable[[Sequence[T]], None],
        give_up: Callable[[T, GenerateError], None],
    ) -> None:
        """Run items in batches; a batch that does not fit is halved, down to one item."""
        waiting = [items[i : i + self._batch_size] for i in range(0, len(items), self._batch_size)]
        while waiting:
            batch = waiting.pop(0)
            if self._fits(batch, run):
                continue
            if len(batch) == 1:
                give_up(batch[0], DeviceOutOfMemory(does_not_fit(self._model.device)))
            else:
                half = (len(batch) + 1) // 2
                waiting[:0] = [batch[:half], batch[half:]]

    def _fits(self, batch: Sequence[T], run: Callable[[Sequence[T]], None]) -> bool:
        """Run the batch; false when memory ran out. By returning, the batch's tensors are freed."""
        try:
            run(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        release_cached(self._model.device)
        return False


def _give_up(branch: _Branch, error: GenerateError) -> None:
    branch.outcome = error


def _settled(branch: _Branch) -> Outcome:
    if branch.outcome is None:
        raise RuntimeError(f"a branch of {len(branch.token_ids)} tokens was left without outcome")
    return branch.outcome
