"""Tiny LLaVA checkpoints with random weights, made by transformers' own classes.

The weights are drawn wide, so that what a model says depends on every position of its prompt and
on its image: an engine that misplaces either gives other tokens.
"""

import contextlib
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)  # Tiny models lose by waiting for a second thread.

SIDE, PATCH = 32, 8
BYTE_VOCABULARY, FALLBACK_VOCABULARY = 280, 420
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
STARTED = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
)
CORPUS = [
    "USER: What is in this picture? ASSISTANT: A red circle on a light background.",
    "Describe the image in one sentence, please. Is this scene indoors? yes no",
    "How many animals are there, and what colour is the largest of them?",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper + ': ' }}{% endif %}"
    "{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer like Llama's: spaces marked, one in front of the text, `<s>` first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [chr(c) for c in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = STARTED
    return _fast(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer like GPT-2's, which can write any text; 280 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer)


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer as LLaVA-1.5 has it: spaces marked, and bytes for what has no token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    spaces = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [spaces[0], decoders.ByteFallback(), decoders.Fuse(), spaces[1]]
    )
    single_bytes = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=FALLBACK_VOCABULARY,
        special_tokens=[*SPECIAL, *single_bytes],
        initial_alphabet=[chr(c) for c in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    known = json.loads(tokenizer.to_str())
    # Bytes are tokens like others, not marks that a text may hold.
    known["added_tokens"] = [a for a in known["added_tokens"] if a["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(known))
    tokenizer.post_processor = STARTED
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def tiny_processor(
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> LlavaProcessor:
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer=tokenizer or tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def tiny_model(
    *, seed: int = 0, context: int = 512, kind: type[Any] = LlamaConfig, **text_keys: Any
) -> LlavaForConditionalGeneration:
    """Float32, on the CPU, in eval mode: 2 text layers, 3 vision layers, 16 features an image."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    text = kind(
        **{
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": context,
            "bos_token_id": SPECIAL.index("<s>"),
            "eos_token_id": SPECIAL.index("</s>"),
            "pad_token_id": SPECIAL.index("<pad>"),
            **text_keys,
        }
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        draw(model)
    return model


def draw(model: Any) -> None:
    """Give a model wide weights, end tokens and eval mode."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, 1.0 if "embed" in name else 1.6 / weight.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = SPECIAL.index("</s>")
    model.generation_config.pad_token_id = SPECIAL.index("<pad>")
    model.eval()


def write_checkpoint(
    folder: Path,
    *,
    model: LlavaForConditionalGeneration | None = None,
    processor: LlavaProcessor | None = None,
) -> Path:
    """Save a checkpoint as transformers does; gives the folder."""
    (model or tiny_model()).save_pretrained(folder)
    (processor or tiny_processor()).save_pretrained(folder)
    return folder


@functools.cache
def shared_checkpoint() -> Path:
    """One checkpoint for all tests of the process that only read it."""
    return write_checkpoint(Path(tempfile.mkdtemp(prefix="tiny-llava-")))


@contextlib.contextmanager
def hub_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[str]:
    """A hub that cannot be reached, and a cache that holds the shared checkpoint; gives its id."""
    repository = folder / "models--tiny--llava"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    shutil.copytree(shared_checkpoint(), repository / "snapshots" / "c0ffee")
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        patched.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        yield "tiny/llava"


def noise_image(seed: int, *, width: int = 40, height: int = 32) -> Image.Image:
    """An RGB image of random pixels, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions(count: int, *, seed: int = 0) -> list[str]:
    """Questions of very different lengths."""
    words = " ".join(CORPUS).split()
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(count)]
