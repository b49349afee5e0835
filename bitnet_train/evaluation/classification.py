"""Loss and accuracy of an image classifier."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.nn.vision.base import Classifier


@dataclass(frozen=True)
class ImageLoss:
    """Sums over images: negative log-likelihood of the class in nats, images classified right, and images."""

    nats: float
    correct: int
    images: int

    @property
    def loss(self) -> float:
        """Nats per image."""
        return self.nats / max(1, self.images)

    @property
    def accuracy(self) -> float:
        """Share of the images whose most likely class is the right one."""
        return self.correct / max(1, self.images)

    @property
    def figure(self) -> str:
        """The figure to judge by, in words."""
        return f"{self.accuracy:.2%} accuracy"

    @property
    def short(self) -> str:
        """The same in little room."""
        return f"{self.accuracy:.2%}"


@torch.no_grad()
def images_loss(model: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> ImageLoss:
    """The loss of ``model`` summed over images, in the autocast type if autocast is on; put it into eval mode.

    ``batches`` are images (batch, channels, height, width) and classes (batch,). A model that gives NaN is right about
    nothing.
    """
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        logits = model.forward(images).float()
        nats += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(dim=1) == labels).logical_and(logits.isfinite().all(dim=1)).sum()
        count += len(labels)
    return ImageLoss(float(nats), int(correct), count)
