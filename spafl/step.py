"""What the tensors of a training step are called: the one vocabulary of exporter, engines and checkpoints."""

ROWS = "rows."
"""rows.<tensor>: only the active rows of a state tensor; its symbolic count is called rows.<layer>."""
ACTIVE = "active."
"""active.<layer> (rows,) int64: which rows those are, ascending, at least one."""
MOMENTUM = "momentum."
"""momentum.<tensor>: the SGD momentum of a trained tensor, of its shape; 0 when a round begins."""
NEXT = "next."
"""next.<input>: what a state tensor or momentum becomes."""

SCALARS = ("lr", "threshold_lr", "coeff", "momentum", "clip")
"""Hyperparameters that are inputs () float32 of the step, so that one graph serves every run."""
NO_CLIP = 3e38
"""The `clip` of a step without clipping: float32 has hardly larger numbers, and no gradient norm reaches it."""
