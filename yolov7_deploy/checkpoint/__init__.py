"""① Weights: ours, and the official .pt without running their code, into plain data; writes ours."""

from yolov7_deploy.checkpoint.loader import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]
