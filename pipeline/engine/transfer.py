"""From the host to the device."""

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on the device. The host does not wait for what the device is at meanwhile, as it
    would with memory that is not pinned."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
