"""How the engine talks to its device.

A CPU does what it is told at once. A GPU works through a queue; nobody waits for it in the loop of the steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch


class Lane:
    """A device that works while it is called."""

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring a tensor to the device."""
        return tensor

    def pace(self) -> None:
        """Wait, after a step, until the device is not far behind."""

    def aside(self, *tensors: torch.Tensor) -> AbstractContextManager[object]:  # noqa: ARG002
        """Work on tensors beside the steps."""
        return nullcontext()

    def fetch(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        """Start to bring a tensor back; what is returned waits for it, in any thread."""
        return tensor.numpy

    def apart(self) -> AbstractContextManager[object]:
        """Work in a thread that does not wait for the steps."""
        return nullcontext()

    def check(self) -> None:
        """After an error: raise what the device has against any further work, and give back memory."""


class CudaLane(Lane):
    """A GPU: copies come from and go to pinned memory, decoding has a stream of its own."""

    # One step runs, one waits for it. With more, requests would join and leave late.
    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._steps: deque[torch.cuda.Event] = deque()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def pace(self) -> None:
        self._steps.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._steps) > self.AHEAD:
            self._steps.popleft().synchronize()

    def aside(self, *tensors: torch.Tensor) -> AbstractContextManager[object]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in tensors:
            # Else its memory could serve another tensor while this stream still reads it.
            tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.current_stream(self._device).record_event()

        def wait() -> np.ndarray:
            done.synchronize()
            return host.numpy()

        return wait

    def apart(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(torch.cuda.Stream(self._device))

    def check(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def lane_for(device: torch.device) -> Lane:
    """Return the way to a device."""
    return CudaLane(device) if device.type == "cuda" else Lane()
