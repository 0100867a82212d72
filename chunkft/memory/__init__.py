"""What a run holds in memory: measured, and predicted."""
