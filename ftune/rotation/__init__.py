"""Training that moves some of the weights at a time, in turn, with any optimizer that keeps its gradients.

`units` finds what a model is made of, `plans` says which units move at which step, `part` is one unit with an optimizer
of its own, and `optimizer` is what the trainer steps.
"""
