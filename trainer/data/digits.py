"""scikit-learn's handwritten digits: the dataset that is always there, without a network."""

import numpy as np

from spafl.layout import Floats
from trainer.data.dataset import Dataset

SIDE = 28
"""Pixels a side after resizing: what LeNet-5 takes."""


def load_digits() -> Dataset:
    """Returns the 1,797 digits as bytes (n, 1, 28, 28), resized from 8x8 bilinearly.

    Source: scikit-learn `load_digits`, the test set of UCI "Optical Recognition of Handwritten Digits".
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    grey = digits.images.astype(np.float32) * np.float32(255 / 16)  # (n, 8, 8), 17 levels
    weights = _bilinear(grey.shape[1], SIDE)
    images = np.rint(weights @ grey @ weights.T).astype(np.uint8)
    return Dataset(images[:, None], digits.target.astype(np.int64), tuple("0123456789"))


def _bilinear(size: int, target: int) -> Floats:
    """Returns the (target, size) matrix that resizes an axis: pixel centres are aligned, edges repeat."""
    position = ((np.arange(target) + 0.5) * size / target - 0.5).clip(0, size - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size))), np.float32)
