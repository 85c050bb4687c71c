"""Detection in millions of images: input, shards of the output, and workers in this process or on a Ray cluster."""
