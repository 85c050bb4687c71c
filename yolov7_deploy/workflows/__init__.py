"""End-to-end pipelines behind the commands: export, quantize, predict, demo."""
