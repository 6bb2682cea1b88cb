"""Weights of 8 or 4 bits, through bitsandbytes: what is stored so, and what is needed for it.

The linear layers of the text model are; they are most of a LLaVA. The rest keeps the model's dtype:

    vision tower, projector   a small part; each image passes them once, and what they lose no
                              question gets back
    lm_head, embeddings       logits that are close would change places; lm_head is often the
                              embeddings' own weights

Runs on the driver too, and imports neither torch nor transformers outside of functions.
"""

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from schemas.errors import SpecError

if TYPE_CHECKING:
    import torch

PACKAGES = ("bitsandbytes", "accelerate")
KEPT = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
CPU_BLOCK = (32, 64)
"""Rows and columns of a 4-bit weight come in such blocks in bitsandbytes' kernels for CPUs."""


def check_installed(quantization: str) -> None:
    """Raise SpecError where a package that `model.quantization` needs is missing."""
    if quantization == "none":
        return
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise SpecError(
            f"model.quantization is {quantization}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install "
            "'lavaflow[quantization]' here and on the workers, or set model.quantization to none"
        )


def load_options(
    quantization: str, *, dtype: "torch.dtype", device: "torch.device"
) -> dict[str, Any]:
    """What `from_pretrained` is told; nothing where weights keep their dtype.

    `dtype`: of what is computed and of what is not quantized.
    """
    if quantization == "none":
        return {}
    # It says with every matrix product that its inputs are cast.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(KEPT),
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def finished(model: "torch.nn.Module", *, device: "torch.device", name: str) -> None:
    """What is left to do once a quantized model is loaded.

    Raises SpecError for a 4-bit layer that bitsandbytes cannot compute on a CPU.
    """
    if device.type != "cpu":
        return
    _check_layers(model, name=name)
    for tensor in (*model.parameters(), *model.buffers()):
        # A weight that still lies in the checkpoint's file keeps the whole of it in memory.
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def _check_layers(model: "torch.nn.Module", *, name: str) -> None:
    from bitsandbytes.nn import Linear4bit

    rows, columns = CPU_BLOCK
    for layer, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        if module.out_features % rows or module.in_features % columns:
            raise SpecError(
                f"model {name}: {layer} is {module.out_features} x {module.in_features}; on a CPU, "
                f"bitsandbytes takes multiples of {rows} x {columns} in 4 bits. Set "
                "model.quantization to 8bit or none"
            )
