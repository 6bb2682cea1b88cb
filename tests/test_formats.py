"""How conversations are written: by checkpoints' templates, and by architecture."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.checkpoint import open_checkpoint
from pipeline.fingerprint import model_fingerprint
from pipeline.formats import FORMATS, format_of, given_template
from pipeline.prompt import messages_for
from pipeline.sources.base import Turn
from pipeline.tokenise import Tokeniser
from schemas.errors import SpecError
from schemas.job import JobSpec, ModelSpec
from tests.models import noise_image, tiny_processor, write_checkpoint

QUESTION = "What is shown in this image?"
EARLIER = (Turn("user", "Who is it?"), Turn("assistant", "A cat."))
PARTS = (
    "{% for p in m.content if p.type == 'image' %}{{ MARK }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
)


def _template(each: str, *, mark: str = "'<image>\n'", last: str = "") -> str:
    body = each.replace("PARTS", PARTS.replace("MARK", mark))
    end = "{% if add_generation_prompt %}{{ '" + last + "' }}{% endif %}"
    return "{% for m in messages %}" + body + "{% endfor %}" + end


TEMPLATES = {
    "LLaVA-1.5": _template(
        "{% if m.role == 'system' %}PARTS{{ ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' }}PARTS{{ ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' }}PARTS{{ '</s>' }}{% endif %}",
        last="ASSISTANT:",
    ),
    "LLaVA-1.6 Mistral": _template(
        "{% if m.role == 'user' %}{{ '[INST] ' }}PARTS{{ ' [/INST]' }}"
        "{% else %}{{ ' ' }}PARTS{{ '</s> ' }}{% endif %}"
    ),
    "LLaVA-1.6 Llama-3": _template(
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}PARTS{{ '<|eot_id|>' }}",
        last="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "OneVision Qwen2": _template(
        "{{ '<|im_start|>' + m.role + ' ' }}PARTS{{ '<|im_end|>' }}",
        last="<|im_start|>assistant\n",
    ),
}
"""In our own words, from what each model's authors document."""
DOCUMENTED = {
    "LLaVA-1.5": f"USER: <image>\n{QUESTION} ASSISTANT:",
    "LLaVA-1.6 Mistral": f"[INST] <image>\n{QUESTION} [/INST]",
    "LLaVA-1.6 Llama-3": f"<|start_header_id|>user<|end_header_id|>\n\n<image>\n{QUESTION}"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "OneVision Qwen2": f"<|im_start|>user <image>\n{QUESTION}<|im_end|><|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("earlier", [(), EARLIER])
def test_prompts_and_ids_are_those_of_apply_chat_template(
    name: str, earlier: tuple[Turn, ...], tmp_path: Path
) -> None:
    processor = tiny_processor(chat_template=TEMPLATES[name])
    folder = write_checkpoint(tmp_path, processor=processor)
    tokeniser = Tokeniser(ModelSpec(path=str(folder)), processor)
    prompt = tokeniser.render(QUESTION, earlier)
    if not earlier:
        assert prompt == DOCUMENTED[name]
    messages = messages_for(QUESTION, conversation=earlier)
    assert prompt == processor.apply_chat_template(messages, add_generation_prompt=True)
    image = noise_image(0)
    with_image: list[dict[str, Any]] = [
        {
            **m,
            "content": [{**p, "image": image} if p["type"] == "image" else p for p in m["content"]],
        }
        for m in messages
    ]
    whole = processor.apply_chat_template(
        with_image, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    places = (tokeniser.image_tokens.of(image.size),)
    assert tokeniser.ids(prompt, places) == whole["input_ids"][0]


FORMATTED = {
    "vicuna": "S USER: <image>\nWho is it? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    "mistral": "[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nWho is it? [/INST] A cat.</s> "
    "[INST] Why? [/INST]",
    "llama-3": "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"
        for role, text in [
            ("system", "S<|eot_id|>"),
            ("user", "<image>\nWho is it?<|eot_id|>"),
            ("assistant", "A cat.<|eot_id|>"),
            ("user", "Why?<|eot_id|>"),
            ("assistant", ""),
        ]
    ),
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nWho is it?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "plain": "S\n<image>\nWho is it?\nA cat.\nWhy?\n",
}


def test_every_format_is_written_as_documented(tmp_path: Path) -> None:
    assert FORMATTED.keys() == FORMATS.keys()
    folder = str(write_checkpoint(tmp_path))
    for name, written in FORMATTED.items():
        spec = ModelSpec(path=folder, chat_template=name, system_prompt="S")
        assert Tokeniser(spec, tiny_processor()).render("Why?", EARLIER) == written


@pytest.mark.parametrize(
    ("text", "token", "name"),
    [
        ({}, None, "vicuna"),
        ({"model_type": "mistral"}, None, "mistral"),
        ({"model_type": "llama"}, "<|start_header_id|>", "llama-3"),
        ({"model_type": "qwen2"}, "<|im_start|>", "chatml"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_without_a_template_the_text_model_decides(
    text: dict[str, str], token: str | None, name: str, file: str, tmp_path: Path
) -> None:
    tokens = [{"content": token}] if token else []
    known: dict[str, Any] = {"added_tokens": tokens}
    if file == "tokenizer_config.json":
        known = {"added_tokens_decoder": dict(enumerate(tokens))}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    (tmp_path / file).write_text(json.dumps(known))
    assert format_of(open_checkpoint(ModelSpec(path=str(tmp_path)))) == name


def test_a_template_of_the_spec_takes_the_place_of_the_checkpoints(tmp_path: Path) -> None:
    folder = str(write_checkpoint(tmp_path))
    own = "{% for m in messages %}<image>Q{{ m.content[-1].text }}{% endfor %}"
    spec = ModelSpec(path=folder, chat_template=own)
    assert Tokeniser(spec, tiny_processor()).render("Why?") == "<image>QWhy?"
    prints = {
        model_fingerprint(
            JobSpec.model_validate(
                {
                    "source": {"format": "images", "path": "x"},
                    "ask": [{"id": "a", "prompt": "b"}],
                    "model": {"path": folder, "chat_template": template},
                    "output": {"path": "y"},
                }
            )
        )["template"]
        for template in (None, own, "vicuna", "plain")
    }
    assert len(prints) == 4


def test_what_is_neither_a_format_nor_a_template_is_a_mistake() -> None:
    with pytest.raises(SpecError, match="'vicunia' is neither one of vicuna, mistral"):
        given_template("vicunia")
