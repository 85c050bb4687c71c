"""Weights and images with the same values on every machine, for comparison with golden files.

A tensor is a pure function of its name and shape: SplitMix64 over the element index, seeded by the CRC-32 of the name.
"""

import math
import zlib

import numpy as np
import torch

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def uniform(name, shape):
    """Return float32 values in [0, 1), from the upper 24 bits of each SplitMix64 word."""
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        word = (np.uint64(zlib.crc32(name.encode())) + np.arange(1, count + 1, dtype=np.uint64)) * _GOLDEN_RATIO
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    return (word >> np.uint64(40)).astype(np.float32).reshape(shape) / np.float32(2**24)


def centred(name, shape):
    """Return float32 values in [-1, 1)."""
    return uniform(name, shape) * np.float32(2) - np.float32(1)


def weight(name, shape, salt=""):
    """Return the value of a state-dict entry, or `None` to keep the value of the model."""
    last = name.rpartition(".")[2]
    if last in {"anchors", "anchor_grid", "num_batches_tracked"}:
        return None
    noise = centred(salt + name, shape)
    if last == "implicit":
        return np.float32(".im." in name) + np.float32(0.1) * noise
    if len(shape) == 4:
        return noise * np.float32(math.sqrt(3 / (0.38 * math.prod(shape[1:]))))
    if last in {"running_var", "weight"}:
        return np.float32(0.9) + np.float32(0.2) * uniform(salt + name, shape)
    return np.float32(0.1) * noise


def fill_model(model, salt=""):
    """Load the deterministic weights into a model and set it to eval mode."""
    state = model.state_dict()
    for name, old in state.items():
        value = weight(name, tuple(old.shape), salt)
        if value is not None:
            state[name] = torch.from_numpy(value)
    model.load_state_dict(state)
    return model.eval()


def make_image(height, width, salt=""):
    """Return a network input [1, 3, height, width]."""
    return torch.from_numpy(uniform(salt + "image", (1, 3, height, width)))
