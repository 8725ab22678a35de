"""Every convolution of a model: what it does, what it sees, and why it may not be replaced."""
