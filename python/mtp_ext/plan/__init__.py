"""Planning: what a training step will need, before the machine is there."""

from mtp_ext.plan.planner import Plan, PlanBytes, left_out, plan

__all__ = ["Plan", "PlanBytes", "left_out", "plan"]
