"""Multi-token prediction training: fused losses, models and decoding."""

import torch  # noqa: F401  (loads libtorch, which _C links against)

try:
    from mtp_ext import _C
except ImportError as error:
    raise ImportError(
        "mtp_ext's native extension _C is not built for this Python and torch; in the source tree run "
        f"'pip install --no-build-isolation -e .' ({error})"
    ) from error

from mtp_ext.ops import (
    MultiTokenLoss,
    RowOptions,
    count_targets,
    debug_checks,
    document_ids,
    linear_cross_entropy,
    multi_token_cross_entropy,
    release_workspace,
)

__version__ = "0.1.0"
build_info = _C.build_info

__all__ = [
    "MultiTokenLoss",
    "RowOptions",
    "build_info",
    "count_targets",
    "debug_checks",
    "document_ids",
    "linear_cross_entropy",
    "multi_token_cross_entropy",
    "release_workspace",
]
