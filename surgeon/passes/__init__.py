"""Passes over `torch.fx` graphs, for a `torch.fx.passes.infra.pass_manager.PassManager` or on their own."""

from surgeon.passes.convert import DynamicConvPass

__all__ = ["DynamicConvPass"]
