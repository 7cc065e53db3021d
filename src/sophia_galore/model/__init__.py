"""The model: where it comes from, its architecture, its weights."""
