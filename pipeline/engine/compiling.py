"""What torch compiles of a model: when that pays, and what is said where it does not work."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch._dynamo.exc import TorchDynamoException

from schemas.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pays_on(device: torch.device, dtype: torch.dtype) -> bool:
    """For all but the text model, which gains by it everywhere: attention, the vision tower."""
    return device.type == "cpu" and dtype == torch.bfloat16


@contextlib.contextmanager
def compiling(model: "PreTrainedModel") -> Iterator[None]:
    """Where something is called for the first time. Raises SpecError where it cannot be compiled.

    On a CPU in bfloat16, weights are copied into the order that oneDNN reads them in; those that
    are quantized would be copied unquantized.
    """
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    is_frozen = pays_on(model.device, model.dtype) and not is_quantized
    try:
        with torch._inductor.config.patch(freezing=is_frozen):
            yield
    except TorchDynamoException as error:
        what = " ".join(str(error).split("\n\n")[0].split())
        raise SpecError(
            f"resources.generate.compile: the model cannot be compiled here ({what}): set it to "
            "false"
        ) from error
