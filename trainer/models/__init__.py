"""Models as ordinary PyTorch, the paper's among them; `sparsify` makes them masked."""

from collections.abc import Callable

from torch import nn

from trainer.models.convolutional import MLP, Conv4, LeNet5
from trainer.models.mobilenet import MobileNet
from trainer.models.resnet import ResNet18
from trainer.models.sensor import CNN1d
from trainer.models.transformer import TextClassifier, ViT

__all__ = ["MLP", "MODELS", "CNN1d", "Conv4", "LeNet5", "MobileNet", "ResNet18", "TextClassifier", "ViT"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "conv4": Conv4,
    "vit": ViT,
    "resnet18": ResNet18,
    "mlp": MLP,
    "mobilenet": MobileNet,
    "cnn1d": CNN1d,
    "text": TextClassifier,
}
"""Name on the command line -> constructor taking the number of labels; each has the input `shape` it expects."""
