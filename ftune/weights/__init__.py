"""Weights as they lie in files: read one tensor at a time, folded, compared and written again."""
