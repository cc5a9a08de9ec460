"""Text in, token sequences out: documents of files and data sets, cut into sequences, or sampled from a model."""
