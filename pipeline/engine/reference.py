"""Reference models with random weights: the shape of a real one, of no use but to be measured.

What a step costs does not depend on what the weights are. They are drawn so that what the model
says depends on every token before it: an engine that misplaces one gives other tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas.errors import SpecError

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
GAIN = 1.6
"""Of every layer. With 1.0 a model of 30 layers repeats its last token for ever; with 2.0 what
bfloat16 rounds off grows to a fifth of the logits' spread."""
IMAGE_TOKEN_ID, START_ID, END_ID, PAD_ID = 0, 1, 2, 3

SHAPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ViT-S-135M": {
        "vision": {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 224,
            "patch_size": 16,
            "projection_dim": 384,
        },
        "text": {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    },
}
"""ViT-S/16 at 224 pixels (196 features an image) before a Llama of SmolLM-135M's shape."""


def random_model(
    name: str, *, seed: int, dtype: "torch.dtype", device: "torch.device"
) -> "LlavaForConditionalGeneration":
    """The model of that shape in eval mode; the same weights for a seed, whatever the dtype.

    Raises SpecError for a name that is none of `SHAPES`.
    """
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    if name not in SHAPES:
        raise SpecError(f"random model {name!r} is not known; there is {', '.join(SHAPES)}")
    shape = SHAPES[name]
    special = {"bos_token_id": START_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    vision = CLIPVisionConfig(**shape["vision"])
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**shape["text"], **special),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=shape["text"]["tie_word_embeddings"],
    )
    model = LlavaForConditionalGeneration(config).eval()
    _draw(model, torch.Generator().manual_seed(seed))
    cast(model, dtype)
    return model.to(device)


def _draw(model: "LlavaForConditionalGeneration", generator: "torch.Generator") -> None:
    """Matrices alone; norms and biases stay as they are."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                gain = 1.0 if "embed_tokens" in name else GAIN
                weight.normal_(0.0, gain * weight[0].numel() ** -0.5, generator=generator)


def cast(model: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """The weights in another dtype, in place. Buffers stay: RoPE's are float32 in every model."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def clip_table() -> np.ndarray:
    """CLIP's normalisation of each value of each channel: float32 [3, 256]."""
    values = np.arange(256, dtype=np.float64) / 255
    mean, std = np.array(CLIP_MEAN)[:, None], np.array(CLIP_STD)[:, None]
    table: np.ndarray = ((values - mean) / std).astype(np.float32)
    return table
