"""Every convolution of a model: its geometry, its inputs, and why it may not be replaced."""
