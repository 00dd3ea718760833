"""Training with forward passes only: two losses along a random direction, a log of 12 bytes a step, and its replay.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2023), is MeZO; Guo et al., "Zeroth-Order
Fine-Tuning of LLMs with Transferable Static Sparsity" (2024), moves only the most sensitive weights.
"""
