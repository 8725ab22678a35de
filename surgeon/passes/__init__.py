"""Passes over `torch.fx` graphs, standalone or for a `torch.fx.passes.infra.pass_manager.PassManager`."""

from surgeon.passes.convert import DynamicConvPass

__all__ = ["DynamicConvPass"]
