"""The paper's released checkpoints: the documented import path."""

from mtp_ext.nn.interop.paper_checkpoints import load_released, save_released

__all__ = ["load_released", "save_released"]
