"""The plain engine: every question a row of its own, answered batch by batch.

It is correct, and simple enough to see that it is. It prefills an image anew for each question and
a batch waits for its longest answer; the slots engine takes its place behind the same seam
(`request.Engine`).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from pipeline.engine.greedy import Row, decode_rows
from pipeline.engine.pixels import normalised
from pipeline.engine.request import ImagePixels, Outcome, Prefix, Request
from schemas.errors import DeviceOutOfMemory, GenerateError, TokenFeatureMismatch

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
        self._batch_size = 1 if _rope_depends_on_the_batch(model) else batch_size
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
            return TokenFeatureMismatch(_mismatch(n_tokens, n_features))
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
                give_up(batch[0], DeviceOutOfMemory(_does_not_fit(self._model.device)))
            else:
                half = (len(batch) + 1) // 2
                waiting[:0] = [batch[:half], batch[half:]]

    def _fits(self, batch: Sequence[T], run: Callable[[Sequence[T]], None]) -> bool:
        """Run the batch; false when memory ran out. By returning, the batch's tensors are freed."""
        try:
            run(batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        else:
            return True
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return False


def _give_up(branch: _Branch, error: GenerateError) -> None:
    branch.outcome = error


def _settled(branch: _Branch) -> Outcome:
    if branch.outcome is None:
        raise RuntimeError(f"a branch of {len(branch.token_ids)} tokens was left without outcome")
    return branch.outcome


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's CPU allocator has no exception class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rope_depends_on_the_batch(model: "LlavaForConditionalGeneration") -> bool:
    """RoPE kinds that scale by the longest position in the batch."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("rope_type") in {"dynamic", "longrope"}


def _mismatch(n_tokens: int, n_features: int) -> str:
    """The likely culprit of the three, told from the difference."""
    message = f"the prompt has {n_tokens} image tokens, the model gives {n_features} features: "
    if n_features - n_tokens == 1:
        return (
            message + "set num_additional_image_tokens to 1 in processor_config.json, or bring its "
            "vision_feature_select_strategy in line with config.json"
        )
    if n_tokens - n_features == 1:
        return (
            message + "bring vision_feature_select_strategy of processor_config.json in line with "
            "config.json, or set num_additional_image_tokens to 0"
        )
    return (
        message
        + "check patch_size in processor_config.json against vision_config.patch_size, then "
        "num_additional_image_tokens and vision_feature_select_strategy"
    )


def _does_not_fit(device: torch.device) -> str:
    return (
        f"the row alone does not fit the memory of {device}: lower max_new_tokens, or use "
        "model.dtype bfloat16 or a larger device"
    )
