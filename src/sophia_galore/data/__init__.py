"""Read records, convert them to conversations and examples with a loss mask, and batch these reproducibly."""
