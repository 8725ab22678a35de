"""One checked file of a model, ONNX or torch.export."""
