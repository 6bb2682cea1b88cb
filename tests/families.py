"""Tiny random checkpoints of every family that goes the fast path, and of models of no family.

All are made by transformers' own classes, with weights drawn as wide as those of `tests.models`.
"""

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from pipeline.engine.onevision import ImagesOnly
from tests.models import CHAT_TEMPLATE, PATCH, SIDE, SPECIAL, draw, tiny_tokenizer

FEATURES = (SIDE // PATCH) ** 2
WIDE = [
    [SIDE, 2 * SIDE],
    [2 * SIDE, SIDE],
    [2 * SIDE, 2 * SIDE],
    [3 * SIDE, SIDE],
    [SIDE, 3 * SIDE],
]
MANY = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
TEXTS = {"Llama": LlamaConfig, "Mistral": MistralConfig, "Qwen2": Qwen2Config, "Phi": PhiConfig}


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is made of. `keys`: of its config beside text and vision."""

    family: str
    text: str
    tower: str = "CLIP"
    keys: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        self.model().save_pretrained(folder)
        self.processor().save_pretrained(folder)
        return folder

    def model(self) -> Any:
        """Float32, on the CPU, in eval mode."""
        config_class, model_class = _CLASSES[self.family]
        vision = {"CLIP": CLIPVisionConfig, "SigLIP": SiglipVisionConfig}[self.tower]
        towers: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        }
        if self.tower == "CLIP":
            towers["projection_dim"] = 32
        config = config_class(
            vision_config=vision(**towers),
            text_config=TEXTS[self.text](**_TEXT),
            image_token_index=SPECIAL.index("<image>"),
            **{**self._reads(), **self.keys},
        )
        return _drawn(model_class, config)

    def processor(self) -> Any:
        return _PROCESSORS[self.family](self)

    def _reads(self) -> dict[str, Any]:
        if self.family == "vipllava":
            return {"vision_feature_layer": [-2, -4, 1]}
        if self.tower == "SigLIP":
            return {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        return {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}

    def image_processor(self) -> Any:
        if self.tower == "SigLIP":
            return SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
        size = {"height": SIDE, "width": SIDE}
        return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)


def _drawn(model_class: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config)
        draw(model)
    return model


_TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": SPECIAL.index("<s>"),
    "eos_token_id": SPECIAL.index("</s>"),
    "pad_token_id": SPECIAL.index("<pad>"),
}
_CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}


def _llava(kind: Kind) -> LlavaProcessor:
    has_class_token = kind.tower == "CLIP"
    return LlavaProcessor(
        image_processor=kind.image_processor(),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default" if has_class_token else "full",
        num_additional_image_tokens=int(has_class_token),
        chat_template=CHAT_TEMPLATE,
    )


def _llava_next(kind: Kind) -> LlavaNextProcessor:
    size = {"height": SIDE, "width": SIDE}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size=size,
            image_grid_pinpoints=kind.keys["image_grid_pinpoints"],
        ),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _llava_onevision(kind: Kind) -> ImagesOnly:
    return ImagesOnly(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=kind.keys["image_grid_pinpoints"],
        ),
        tokenizer=tiny_tokenizer(),
        num_image_tokens=FEATURES,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=kind.keys["vision_aspect_ratio"],
        chat_template=CHAT_TEMPLATE,
    )


_PROCESSORS = {
    "llava": _llava,
    "vipllava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
}
_BAKLLAVA = {"projector_hidden_act": "gelu", "image_seq_length": FEATURES}

KINDS = {
    "LLaVA, CLIP, Llama": Kind("llava", "Llama"),
    "LLaVA, CLIP, Mistral (BakLLaVA)": Kind("llava", "Mistral", keys=_BAKLLAVA),
    "LLaVA, CLIP, Phi": Kind("llava", "Phi"),
    "LLaVA, SigLIP, Llama": Kind("llava", "Llama", "SigLIP"),
    "LLaVA, SigLIP, Qwen2": Kind("llava", "Qwen2", "SigLIP"),
    "LLaVA-NeXT, CLIP, Mistral": Kind("llava_next", "Mistral", keys={"image_grid_pinpoints": WIDE}),
    "LLaVA-NeXT, CLIP, Llama": Kind("llava_next", "Llama", keys={"image_grid_pinpoints": MANY}),
    "LLaVA-OneVision, SigLIP, Qwen2": Kind(
        "llava_onevision",
        "Qwen2",
        "SigLIP",
        keys={"image_grid_pinpoints": MANY, "vision_aspect_ratio": "anyres_max_4"},
    ),
    "VipLLaVA, CLIP, Llama": Kind("vipllava", "Llama"),
}


@functools.cache
def saved_kind(name: str) -> Path:
    """One checkpoint of each kind for all tests of the process."""
    return KINDS[name].save(Path(tempfile.mkdtemp(prefix="tiny-family-")))


def rename_as_on_the_hub(folder: Path) -> None:
    """Weights under the names that checkpoints of the hub have had from the beginning."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if not name.startswith("vision_tower.vision_model.")
        else name: weight
        for name, weight in weights.items()
    }
    for part in ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head."):
        assert any(name.startswith(part) for name in old), (part, sorted(old)[:5])
    assert any(name.startswith("multi_modal_projector.") for name in old)
    save_file(old, path, metadata={"format": "pt"})


# The slow path


def idefics3() -> tuple[Any, Any]:
    """Cuts images into tiles, and writes more than image tokens for them."""
    tokenizer = tiny_tokenizer()
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    config = Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config=LlamaConfig(**{**_TEXT, "max_position_embeddings": 1024}),
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return _drawn(Idefics3ForConditionalGeneration, config), processor


def paligemma() -> tuple[Any, Any]:
    """Sees the prompt in both directions: what is answered is read otherwise than what is asked."""
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = FEATURES
    processor = PaliGemmaProcessor(
        image_processor=images, tokenizer=tiny_tokenizer(), chat_template=CHAT_TEMPLATE
    )
    size = 8 * (len(processor.tokenizer) // 8 + 1)
    config = PaliGemmaConfig(
        vision_config=_headless_tower(),
        text_config=GemmaConfig(**{**_TEXT, "vocab_size": size, "head_dim": 16}),
        projection_dim=64,
        tie_word_embeddings=False,
        image_token_index=SPECIAL.index("<image>"),
    )
    return _drawn(PaliGemmaForConditionalGeneration, config), processor


def _headless_tower() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )


def gemma3() -> tuple[Any, Any]:
    """Sees an image in both directions, and is told by token types where one is."""
    plain = tiny_tokenizer()
    marks = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=marks,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<boi>"),
    )
    config = Gemma3Config(
        vision_config=_headless_tower(),
        text_config=Gemma3TextConfig(**{**_TEXT, "head_dim": 16, "sliding_window": 16}),
        mm_tokens_per_image=4,
        image_token_index=SPECIAL.index("<image>"),
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        tie_word_embeddings=False,
    )
    return _drawn(Gemma3ForConditionalGeneration, config), processor


SLOW = {"Idefics3": idefics3, "PaliGemma": paligemma, "Gemma3": gemma3}


@functools.cache
def saved_slow(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-slow-"))
    model, processor = SLOW[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
