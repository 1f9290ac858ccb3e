"""The nearest mean of a class, fitted to scikit-learn's digits, as an example of a model and of a data set of your own."""

import torch
from torch import Tensor, nn

import robustbox as rb


class NearestMean(nn.Module):
    """Scores are minus the squared distances to the means of the classes: images [n,1,8,8] in [0, 1] -> logits [n,10].

    Args:
        means: [10,64].
    """

    means: Tensor

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)

    def forward(self, images: Tensor) -> Tensor:
        """Normalisation, where a model needs any, stands here: images come in [0, 1]."""
        return -torch.cdist(images.flatten(1), self.means).square()


def nearest_mean() -> nn.Module:
    """The nearest mean of a class of scikit-learn's digits, those that `digits` leaves for training."""
    images, labels = rb.load_data("digits:train")[:2]
    means = torch.stack([images[labels == label].flatten(1).mean(dim=0) for label in range(10)])
    return NearestMean(means).eval()


def odd_digits() -> tuple[Tensor, Tensor, list[str]]:
    """The odd ones of scikit-learn's digits."""
    images, labels, classes, _ = rb.load_data("digits")
    odd = labels % 2 == 1
    return images[odd], labels[odd], list(classes)
