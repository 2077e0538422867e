"""What a run shows and leaves to read: records, progress, tables, plots, a sample."""
