"""Examples: where they come from, how they enter a model, and which client has which."""

from trainer.data.arrays import load_arrays, save_arrays
from trainer.data.dataset import Dataset, Split, input_spec, model_input, split_off_test
from trainer.data.partition import Client, Partition, partition
from trainer.data.source import open_dataset

__all__ = [
    "Client",
    "Dataset",
    "Partition",
    "Split",
    "input_spec",
    "load_arrays",
    "model_input",
    "open_dataset",
    "partition",
    "save_arrays",
    "split_off_test",
]
