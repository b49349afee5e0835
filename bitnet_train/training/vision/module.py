"""The Lightning module of an image classifier."""

import torch.nn.functional as F
from torch import Tensor

from bitnet_train.nn.vision.base import Classifier
from bitnet_train.training.config import RunConfig
from bitnet_train.training.module import TrainingModule


class ClassificationModule(TrainingModule):
    """Training of a classifier by the cross-entropy of the right class, a mean over the images of a forward pass."""

    def __init__(self, cfg: RunConfig, classifier: Classifier, compiled: bool) -> None:
        super().__init__(cfg, compiled)
        self.classifier = classifier

    @property
    def network(self) -> Classifier:
        return self.classifier

    def _batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.classifier(images).float(), labels)
