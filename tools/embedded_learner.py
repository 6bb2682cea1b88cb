"""The embedded model with the throw-away heads of its first training stage, and the losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.embedded_model import build_model
from tools.packing import PackedBatch
from tools.shapes import COLOURS, SHAPES
from tools.training_batches import Example

COLOUR_NAMES = tuple(COLOURS)


class Learner(nn.Module):
    """The model, the two throw-away heads of the first stage, and the losses."""

    def __init__(self, processor: LlavaProcessor) -> None:
        super().__init__()
        self.llava: LlavaForConditionalGeneration = build_model(processor)
        # On a CPU the fused kernel's backward pass takes three times the eager one's.
        self.llava.set_attn_implementation("eager")
        width = self.llava.config.vision_config.hidden_size
        self.shape_head = nn.Linear(width, len(SHAPES))
        self.colour_head = nn.Linear(width, len(COLOURS))
        images = processor.image_processor
        self.register_buffer("mean", torch.tensor(images.image_mean)[None, :, None, None])
        self.register_buffer("std", torch.tensor(images.image_std)[None, :, None, None])

    def see(self, examples: list[Example]) -> torch.Tensor:
        """Patch features [B, 64, width] of the layer that LLaVA reads; the last is not run."""
        stacked = np.stack([example.pixels for example in examples])
        pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
        tower = self.llava.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings((pixels - self.mean) / self.std))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]

    def sight_loss(self, features: torch.Tensor, examples: list[Example]) -> torch.Tensor:
        """Cross-entropy of shape and colour over the patches that the shapes touch."""
        touched = torch.from_numpy(np.stack([example.patches for example in examples]))
        rows = touched.nonzero()[:, 0]
        seen = features[touched].float()
        shapes = torch.tensor([SHAPES.index(example.shape) for example in examples])
        colours = torch.tensor([COLOUR_NAMES.index(example.colour) for example in examples])
        losses = functional.cross_entropy(self.shape_head(seen), shapes[rows], reduction="none")
        losses = losses + functional.cross_entropy(
            self.colour_head(seen), colours[rows], reduction="none"
        )
        return (losses / touched.sum(1)[rows]).sum() / len(examples)

    def read(self, features: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, vocabulary] where an answer token is due, and those tokens [N]."""
        llava = self.llava
        embedded = llava.get_input_embeddings()(batch.ids)
        images = llava.model.multi_modal_projector(features).to(embedded.dtype)
        places = (batch.ids == llava.config.image_token_index)[..., None]
        hidden = llava.model.language_model(
            inputs_embeds=embedded.masked_scatter(places, images),
            attention_mask=hidden_from(batch.mask, embedded.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        due = batch.learned[:, 1:]
        return llava.lm_head(hidden[:, :-1][due]), batch.ids[:, 1:][due]


def hidden_from(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The boolean mask as numbers to add to attention scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def loss_of(learner: Learner, examples: list[Example], batch: PackedBatch | None) -> torch.Tensor:
    """The stage's loss; later stages keep a share of the first one's."""
    with torch.autocast("cpu", torch.bfloat16):
        features = learner.see(examples)
        if batch is None:
            return learner.sight_loss(features, examples)
        logits, due = learner.read(features, batch)
        loss = functional.cross_entropy(logits.float(), due)
        return loss + 0.2 * learner.sight_loss(features, examples)
