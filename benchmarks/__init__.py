"""What is timed, and its committed results."""
