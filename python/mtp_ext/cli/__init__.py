"""The ``mtp`` command."""
