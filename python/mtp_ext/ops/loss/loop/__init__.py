"""The row-chunk loop of GPUs and sharded vocabularies."""
