"""Training of YOLOv7 networks: data pipeline, losses, train step, trainer, distributed training and resuming."""
