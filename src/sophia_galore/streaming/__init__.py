"""Tensors that live in host memory or on disk, and visit the compute device in buffers of fixed size."""
