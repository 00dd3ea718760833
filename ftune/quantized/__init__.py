"""Weights in few bits: codes with a scale and an offset for each group of inputs."""
