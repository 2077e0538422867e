"""Training on several processes by torch's own FSDP2."""

from mtp_ext.distributed.clip import clip_grad_norm_
from mtp_ext.distributed.fully_shard import fully_shard_

__all__ = ["clip_grad_norm_", "fully_shard_"]
