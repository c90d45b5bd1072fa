"""Small arrays from the host to the device and back, without a wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """From pinned memory: a copy from any other waits until the device has done it."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host_later(values: Tensor) -> Tensor:
    """A copy on the host; it is there once the device has done what was queued before it."""
    return values.to("cpu", non_blocking=True, copy=True)
