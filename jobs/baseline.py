"""transformers' own `generate` on the rows of a workload: what the engine is measured against.

In left-padded batches, as its documentation has it, with images normalised and prompts expanded
beforehand. Every question is a row of its own: `generate` knows nothing of questions that share an
image.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from jobs.workload import LOOKED_AT, Row, Workload
from pipeline.engine.family import FAMILIES
from pipeline.engine.pixels import normalised

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Cache = Literal["default", "static"]
Order = Literal["prompt", "answer"]
Padding = Literal["left", "right"]
Tokens = list[int]


@dataclass(frozen=True)
class Setting:
    """How `generate` is used.

    `order`: rows are batched by the length of their prompts, which everybody can do, or by that
    of their answers, which nobody knows beforehand. `padding`: right, which is wrong, to show it.
    """

    batch_size: int
    cache: Cache = "default"
    order: Order = "prompt"
    padding: Padding = "left"


def twin(model: "LlavaForConditionalGeneration") -> "LlavaForConditionalGeneration":
    """A second model over the same weights: what one side does to its modules is its own affair."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Baseline:
    """Answers rows by `generate`, with the end tokens switched off.

    `table`: float32 [3, 256] of `pixels.pixel_table`.
    """

    def __init__(
        self, model: "LlavaForConditionalGeneration", work: Workload, table: np.ndarray
    ) -> None:
        self._model = twin(model)
        self._model.generation_config.eos_token_id = None
        # Padding is masked: any id will do, but that of an image.
        self._pad = int(model.config.image_token_id == 0)
        stacked = torch.from_numpy(np.stack(work.images))
        on_device = torch.from_numpy(table).to(model.device)
        self._pixels = normalised(stacked, on_device).to(model.dtype)

    def warm_up(self, rows: Sequence[Row], setting: Setting) -> None:
        """A batch of the longest prompts, a few tokens each; what is compiled is compiled now."""
        if self._model.device.type == "cuda":
            # As long as any will be, or each longer answer would compile again.
            self._model._previous_max_cache_length = max(
                len(row.token_ids) + row.new_tokens for row in rows
            )
        longest = sorted(rows, key=lambda row: len(row.token_ids))[-setting.batch_size :]
        self.answer([replace(row, new_tokens=3) for row in longest], setting)

    def answer(self, rows: Sequence[Row], setting: Setting) -> list[Tokens]:
        """Each row's tokens, in the order of `rows`."""
        answers: dict[int, Tokens] = {}
        for batch in _batches(rows, setting):
            said = self._generate([rows[i] for i in batch], setting).tolist()
            answers.update((i, said[n][: rows[i].new_tokens]) for n, i in enumerate(batch))
        return [answers[i] for i in range(len(rows))]

    def alone(self, row: Row) -> tuple[Tokens, torch.Tensor]:
        """The tokens of this one prompt, unpadded, and the logits [tokens, vocabulary] of each."""
        out = self._model.generate(
            **self._inputs([row]),
            **_greedy(row.new_tokens),
            output_logits=True,
            return_dict_in_generate=True,
        )
        said: Tokens = out.sequences[0, len(row.token_ids) :].tolist()
        return said, torch.cat(out.logits).float()

    @torch.inference_mode()
    def forced(self, row: Row, said: Tokens) -> torch.Tensor:
        """The logits [tokens, vocabulary] where each token of `said` was chosen, in float32."""
        whole = Row(row.image, (*row.token_ids, *said), 0)
        logits = self._model(
            **self._inputs([whole]), use_cache=False, logits_to_keep=len(said) + 1
        ).logits
        forced: torch.Tensor = logits[0, :-1].float()
        return forced

    def _generate(self, batch: Sequence[Row], setting: Setting) -> torch.Tensor:
        """What is said on each row [rows, longest answer of the batch]."""
        options: dict[str, Any] = _greedy(max(row.new_tokens for row in batch))
        if setting.cache == "static":
            options["cache_implementation"] = "static"
            if self._model.device.type == "cpu":
                # Where nothing is compiled, a cache as long as the longest so far only costs.
                self._model._previous_max_cache_length = -1
        inputs = self._inputs(batch, setting.padding)
        whole: torch.Tensor = self._model.generate(**inputs, **options)
        return whole[:, inputs["input_ids"].shape[1] :]

    def _inputs(self, batch: Sequence[Row], padding: Padding = "left") -> dict[str, torch.Tensor]:
        """Padded ids and mask [rows, longest prompt], and pixels [rows, 3, H, W], or of tiles."""
        longest = max(len(row.token_ids) for row in batch)
        ids = torch.full((len(batch), longest), self._pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            start = longest - len(row.token_ids) if padding == "left" else 0
            ids[i, start : start + len(row.token_ids)] = torch.tensor(row.token_ids)
            mask[i, start : start + len(row.token_ids)] = 1
        device = self._model.device
        inputs = {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "pixel_values": self._pixels[[row.image for row in batch]],
        }
        if FAMILIES[self._model.config.model_type].has_tiles:
            inputs["image_sizes"] = torch.tensor([LOOKED_AT[::-1]] * len(batch))
        return inputs


def _batches(rows: Sequence[Row], setting: Setting) -> Iterator[list[int]]:
    """The rows' numbers, the longest first, so that what does not fit shows at once."""

    def length(i: int) -> tuple[int, int]:
        prompt, answer = len(rows[i].token_ids), rows[i].new_tokens
        return (prompt, 0) if setting.order == "prompt" else (answer, prompt)

    order = sorted(range(len(rows)), key=length, reverse=True)
    for start in range(0, len(order), setting.batch_size):
        yield order[start : start + setting.batch_size]


def _greedy(new_tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
