"""Public import path of :mod:`mtp_ext.nn.interop.paper_checkpoints`: the paper's released checkpoints."""

from mtp_ext.nn.interop.paper_checkpoints import load_released, save_released

__all__ = ["load_released", "save_released"]
