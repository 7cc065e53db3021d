"""The model: where it comes from, its anatomy, its weights."""
