"""PyTorch model in, bundle out: the graphs a device runs, each proven equal to PyTorch before it is written."""
