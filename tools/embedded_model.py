"""Builds the embedded model's parts, a true LLaVA in small, and writes them as a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tools.questions import SYSTEM_TEXTS, answer, caption, every_question, reworded
from tools.shapes import COLOURS, SHAPES, SIDE_PX

PATCH_PX = 8
IMAGE_TOKENS = (SIDE_PX // PATCH_PX) ** 2
CONTEXT_TOKENS = 2048
VOCABULARY = 640
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{{ message['role'] | upper }}: {% endif -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{{ '</s>' if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""


def build_processor() -> LlavaProcessor:
    """LLaVA's processor for 64-pixel images, with LLaVA-1.5's conversation template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the questions and answers; any text encodes, `<s>` goes in front.

    A leading space belongs to the word after it, so that a prompt ending in `ASSISTANT:` and an
    answer starting with a space tokenise as their concatenation does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Digits stay single, whatever numbers a prompt holds.
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizer_trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def tokenizer_corpus() -> list[str]:
    """Every question with its answer, as asked and as a person would type it, and the captions."""
    asked = [*every_question(), *map(reworded, every_question())]
    answers = [answer(question, colour="red", shape="circle") for question in asked]
    turns = [f"USER: {q} ASSISTANT: {a}" for q, a in zip(asked, answers, strict=True)]
    captions = [caption(colour, shape) for colour in COLOURS for shape in SHAPES]
    words = [f" {word}" for word in (*COLOURS, *SHAPES, "yes", "no")]
    return [*turns, *(f"\n{q}" for q in asked), *captions, *words * 4, *SYSTEM_TEXTS]


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The untrained model, float32.

    The vision tower's last layer is never read (`vision_feature_layer=-2`) and stays as drawn.
    """
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE_PX,
        patch_size=PATCH_PX,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.04,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **special)
    return model


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes the checkpoint in bfloat16, swapping the whole folder in at the end."""
    staging, retired = folder.with_name(".new"), folder.with_name(".old")
    for leftover in (staging, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    rounded = LlavaForConditionalGeneration(model.config).to(torch.bfloat16)
    rounded.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(staging)
    processor.save_pretrained(staging)
    for file in staging.iterdir():
        file.chmod(0o644)
    if folder.exists():
        os.rename(folder, retired)
    os.rename(staging, folder)
    shutil.rmtree(retired, ignore_errors=True)
