"""What measures: cases, timing, memory, the machine, the files of results."""
