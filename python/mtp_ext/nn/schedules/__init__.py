"""Schedules: the orders in which the heads' forwards, losses and backwards run."""
