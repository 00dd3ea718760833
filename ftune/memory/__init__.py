"""What a training step holds in memory, known before it runs."""
