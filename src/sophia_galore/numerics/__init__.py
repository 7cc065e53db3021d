"""Pure functions of tensors: no modules, files or device names."""
