"""How conversations are written, where a checkpoint brings no chat template: by architecture.

Each as its authors document it, the image in front of the text of its message:

    vicuna    LLaVA-1.5    {system} USER: <image>\\n{q} ASSISTANT: {a}</s>USER: {q} ASSISTANT:
    mistral   LLaVA-1.6    [INST] <image>\\n{q} [/INST] {a}</s> [INST] {q} [/INST]
    llama-3   LLaVA-NeXT   <|start_header_id|>user<|end_header_id|>\\n\\n<image>\\n{q}<|eot_id|>...
    chatml    Qwen         <|im_start|>user\\n<image>\\n{q}<|im_end|>\\n<|im_start|>assistant\\n
    plain     captions     <image>\\n{q}\\n{a}\\n

Knows which format a checkpoint's files speak of, not how one is rendered.
"""

from collections.abc import Mapping

from pipeline.engine.checkpoint import Checkpoint
from schemas.errors import SpecError

IMAGE_TOKEN = "<image>"

_IMAGE = (
    "{%- set image -%}{%- for part in message.content if part.type == 'image' -%}"
    "{{ '<image>\n' }}{%- endfor -%}{%- endset -%}"
)
_TEXT = (
    "{%- set text = message.content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join(' ') -%}"
)
_EACH = "{%- for message in messages -%}" + _IMAGE + _TEXT

FORMATS: Mapping[str, str] = {
    "vicuna": _EACH + "{%- if message.role == 'system' -%}{{ text + ' ' }}"
    "{%- elif message.role == 'assistant' -%}{{ 'ASSISTANT: ' + text + '</s>' }}"
    "{%- else -%}{{ 'USER: ' + image + text + ' ' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}",
    "mistral": "{%- set said = namespace(system='') -%}"
    + _EACH
    + "{%- if message.role == 'system' -%}"
    "{%- set said.system = '<<SYS>>\n' + text + '\n<</SYS>>\n\n' -%}"
    "{%- elif message.role == 'assistant' -%}{{ ' ' + text + '</s> ' }}"
    "{%- else -%}{{ '[INST] ' + said.system + image + text + ' [/INST]' }}"
    "{%- set said.system = '' -%}{%- endif -%}{%- endfor -%}",
    "llama-3": _EACH + "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + image"
    " + text + '<|eot_id|>' }}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}",
    "chatml": _EACH + "{{ '<|im_start|>' + message.role + '\n' + image + text + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    "plain": _EACH + "{{ image + text + '\n' }}{%- endfor -%}",
}
_MARKS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama-3"}
"""Tokens that tell what a text model was trained with."""


def given_template(chat_template: str | None) -> str | None:
    """What `model.chat_template` stands for. Raises SpecError for what is none."""
    if chat_template is None or chat_template in FORMATS:
        return FORMATS.get(chat_template or "")
    if "{" not in chat_template:
        raise SpecError(
            f"model.chat_template: {chat_template!r:.80} is neither one of {', '.join(FORMATS)} "
            "nor a Jinja template"
        )
    return chat_template


def format_of(checkpoint: Checkpoint) -> str:
    """The name of the format that a checkpoint without a chat template was trained with."""
    text = checkpoint.config.get("text_config") or {}
    known = {token.get("content") for token in _added_tokens(checkpoint)}
    for token, name in _MARKS.items():
        if token in known:
            return name
    return "mistral" if text.get("model_type") == "mistral" else "vicuna"


def _added_tokens(checkpoint: Checkpoint) -> list[Mapping[str, object]]:
    listed = checkpoint.read_json("tokenizer.json").get("added_tokens") or []
    decoder = checkpoint.read_json("tokenizer_config.json").get("added_tokens_decoder") or {}
    return [each for each in (*listed, *decoder.values()) if isinstance(each, Mapping)]
