"""Verified export of a model to one file, ONNX or torch.export."""
