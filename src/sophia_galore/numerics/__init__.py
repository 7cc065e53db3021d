"""Tensors only: no modules, files or device names."""
