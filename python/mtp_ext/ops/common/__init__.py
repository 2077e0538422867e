"""What every operation stands on: argument checks, results, memory, and what torch's runtime asks for."""
