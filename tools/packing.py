"""Packs the questions about one image into one training sequence.

    [prefix with image tokens][question 1 + answer 1][question 2 + answer 2]...

In a tree each branch attends to the prefix and to itself only, at the positions that it would have
alone, so that every question is learned as it will be asked alone. In a conversation the branches
are turns and attention is plainly causal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Packed:
    """Token ids [T], branch of each token [T] (0 is the prefix), and whether it is learned [T]."""

    ids: list[int]
    branches: list[int]
    learned: list[bool]
    is_tree: bool


@dataclass(frozen=True)
class PackedBatch:
    """Left-padded sequences: ids, positions, learned [B, T]; mask bool [B, 1, T, T]."""

    ids: torch.Tensor
    positions: torch.Tensor
    learned: torch.Tensor
    branches: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Packer:
    """Packs turns with one tokenizer; `encode` expands `<image>` and adds no `<s>`."""

    encode: Encode
    image_id: int
    eos_id: int

    def pack(
        self, turns: Sequence[tuple[str, str]], *, system: str = "", is_tree: bool = True
    ) -> Packed:
        """One sequence of (question, answer) turns, learned where the answers are."""
        lead = f"{system} " if system else ""
        prefix: list[int] = []
        ids: list[int] = []
        branches: list[int] = []
        learned: list[bool] = []
        for number, (question, answer) in enumerate(turns, start=1):
            if number == 1 or is_tree:
                prompt = self.encode(f"<s>{lead}USER: <image>\n{question} ASSISTANT:")
                split = len(prompt) - prompt[::-1].index(self.image_id)
                prefix, prompt = prompt[:split], prompt[split:]
            else:
                prompt = self.encode(f"USER: {question} ASSISTANT:")
            reply = [*self.encode(f" {answer}"), self.eos_id]
            ids += prompt + reply
            branches += [number] * (len(prompt) + len(reply))
            learned += [False] * len(prompt) + [True] * len(reply)
        return Packed(
            ids=prefix + ids,
            branches=[0] * len(prefix) + branches,
            learned=[False] * len(prefix) + learned,
            is_tree=is_tree,
        )


def collate(sequences: Sequence[Packed], *, pad_id: int) -> PackedBatch:
    """Left-pads the sequences and builds their masks and positions."""
    length = max(len(sequence.ids) for sequence in sequences)
    size = len(sequences)
    ids = torch.full((size, length), pad_id)
    branches = torch.full((size, length), -1)
    learned = torch.zeros((size, length), dtype=torch.bool)
    is_tree = torch.tensor([sequence.is_tree for sequence in sequences])
    for row, sequence in enumerate(sequences):
        start = length - len(sequence.ids)
        ids[row, start:] = torch.tensor(sequence.ids)
        branches[row, start:] = torch.tensor(sequence.branches)
        learned[row, start:] = torch.tensor(sequence.learned)
    query, key = branches[:, :, None], branches[:, None, :]
    related = (query == key) | (key == 0) | ~is_tree[:, None, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & related & (key >= 0) & (query >= 0)
    # The position of a token is the number of tokens it sees before it.
    positions = (mask.sum(-1) - 1).clamp(min=0)
    mask |= torch.eye(length, dtype=torch.bool)
    return PackedBatch(
        ids=ids, positions=positions, learned=learned, branches=branches, mask=mask[:, None]
    )
