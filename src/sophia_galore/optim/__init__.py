"""Optimizer states and update steps, and the `torch.optim` classes."""
