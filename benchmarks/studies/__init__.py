"""What is not timed: errors against float64, and models trained alike. Each is a command of its own."""
