"""Updates made inside backward: each weight moves as soon as its gradient is there, and the gradient is freed.

The engine holds the hooks, the norm and the loss scale; a rule says how one tensor moves. The same rules also step over
gradients that were kept.
"""
