"""The YOLOv7 networks: layer tables, blocks, heads, and fusion to the deploy form."""
