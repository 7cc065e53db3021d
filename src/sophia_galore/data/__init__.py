"""Records on disk -> chat text with a loss mask -> examples -> batches in a reproducible order."""
