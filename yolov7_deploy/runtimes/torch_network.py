"""The fused network on a device: uint8 canvases in, decoded boxes out, and what of them leaves the device.

Everything here is plain torch and gives the same on every device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from yolov7_deploy.image import FloatArray
from yolov7_deploy.model.yolov7 import Yolov7


class TorchNetwork:
    """A fused model in one precision, channels last: the layout of tensor cores, and on CPUs a third faster too.

    Weights and activations are float32 or half. The head is decoded in float32 in both: half is as coarse as half a
    pixel from 512 on, and a whole one from 1024.

    Args:
        model: A fused model in float32; it is converted in place.
        device: Where it runs.
        half: Half precision.
    """

    def __init__(self, model: Yolov7, device: torch.device, *, half: bool) -> None:
        self.device = device
        self.dtype = torch.float16 if half else torch.float32
        self._model = model.to(device)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # not the anchors of the head
                module.to(self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A divisor on the device: by a number of the host, CUDA multiplies with its reciprocal and rounds otherwise.
        self._white = torch.tensor(255, dtype=torch.float32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # callers have streams of their own, which would not wait for the weights

    def empty_input(self, batch: int, canvas_hw: tuple[int, int]) -> Tensor:
        """Room for a network input [B, 3, H, W]."""
        shape = (batch, 3, *canvas_hw)
        return torch.zeros(shape, dtype=self.dtype, device=self.device).to(memory_format=torch.channels_last)

    def prepare(self, canvases: Tensor, images: Tensor) -> Tensor:
        """Fills `images` [B, 3, H, W] (RGB, 0..1) from canvases uint8 [B, H, W, 3] BGR.

        In float32 it is bit for bit `to_network_input`; half rounds that once.
        """
        return torch.div(canvases.flip(-1).permute(0, 3, 1, 2), self._white, out=images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Head maps [B, 3 * (5 + C), H, W] of the network's own precision, fine to coarse."""
        return self._model.head.maps(self._model.features(images))

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Head maps to float32 [B, A, 5 + C]; see `Detect.decode`."""
        head = self._model.head
        return head.decode([head.as_raw(x).float() for x in maps])

    def predict(self, images: Tensor) -> Tensor:
        """Network inputs to float32 [B, A, 5 + C]: cx, cy, w, h in input pixels, objectness, class probabilities."""
        return self.decode(self.maps(images))


def candidates(decoded: Tensor, conf: float) -> tuple[Tensor, Tensor]:
    """The rows of a decoded output that can become detections, in their order.

    `postprocess` finds the same in an image's rows as in all its anchors: only those are left out that it leaves
    out too, because no score of theirs exceeds `conf`. Rows that hold no number stay, and are its to judge.

    Args:
        decoded: float32 [B, A, 5 + C].
        conf: See `Thresholds`.

    Returns:
        Rows float32 [K, 5 + C], and int64 [K], the image that each is of. Finding how many there are waits for a GPU.
    """
    objectness = decoded[..., 4]
    chosen = objectness > conf
    if decoded.shape[2] > 6:
        # Rounding keeps order, so the best product is that of the best class.
        chosen &= ~(objectness * decoded[..., 5:].amax(-1) <= conf)
    images, anchors = chosen.nonzero(as_tuple=True)
    return decoded[images, anchors], images


def split_by_image(rows: Tensor, images: Tensor, count: int) -> list[FloatArray]:
    """`candidates` on the host as one array [K_i, 5 + C] for each of `count` images."""
    ends = np.searchsorted(images.numpy(), np.arange(1, count))
    return np.split(rows.numpy(), ends)
