"""What a model file, an engine or a variant holds and costs."""
