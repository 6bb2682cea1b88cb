"""Reference models with random weights: the shape of a real one, of no use but to be measured.

What a step costs does not depend on what the weights are. They are drawn so that what the model
says depends on every token before it: an engine that misplaces one gives other tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from schemas.errors import SpecError

if TYPE_CHECKING:
    import torch
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

GAIN = 1.6
"""Of every layer. With 1.0 a model of 30 layers repeats its last token for ever; with 2.0 what
bfloat16 rounds off grows to a fifth of the logits' spread."""
SPECIAL = IMAGE, START, PAD, UNKNOWN = "<image>", "<s>", "<pad>", "<unk>"
"""Ids 0 to 3."""

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

    shape = _shape(name)
    special = {"bos_token_id": SPECIAL.index(START), "pad_token_id": SPECIAL.index(PAD)}
    vision = CLIPVisionConfig(**shape["vision"])
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**shape["text"], **special, eos_token_id=None),
        image_token_index=SPECIAL.index(IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=shape["text"]["tie_word_embeddings"],
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        _draw(model)
    cast(model, dtype)
    return model.to(device)


def _draw(model: "LlavaForConditionalGeneration") -> None:
    """Matrices alone; norms and biases stay as they are."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            gain = 1.0 if "embed_tokens" in name else GAIN
            weight.normal_(0.0, gain * weight[0].numel() ** -0.5)


def cast(model: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """The weights in another dtype, in place. Buffers stay: RoPE's are float32 in every model."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def random_processor(name: str) -> "LlavaProcessor":
    """A processor for that model: CLIP's for images, and a tokenizer with a word for every id.

    The words are w0, w1 and so on. There is no end token: answers are as long as they may be.
    Raises SpecError as `random_model` does.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    shape = _shape(name)
    side = shape["vision"]["image_size"]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=_tokenizer(shape["text"]["vocab_size"]),
        patch_size=shape["vision"]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _tokenizer(size: int) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{n}" for n in range(size - len(SPECIAL)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, SPECIAL.index(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
    )


def _shape(name: str) -> Mapping[str, Mapping[str, Any]]:
    if name not in SHAPES:
        raise SpecError(f"random model {name!r} is not known; there is {', '.join(SHAPES)}")
    return SHAPES[name]
