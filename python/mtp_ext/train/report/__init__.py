"""Reports of a run: records, progress, tables, plots and a text sample."""
