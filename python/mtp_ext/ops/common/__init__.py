"""Shared by all operations: device backends, argument checks, results, memory and runtime state."""
