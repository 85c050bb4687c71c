"""Reading and writing of weights: official `.pt` files without executing them, and safetensors."""

from yolov7_deploy.checkpoint.loader import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]
