"""The Lightning module of an image classifier."""

from torch import Tensor

from bitnet_train.nn.vision.base import Classifier
from bitnet_train.training.config import RunConfig
from bitnet_train.training.losses.classification import class_loss
from bitnet_train.training.losses.config import CrossEntropyLoss
from bitnet_train.training.losses.parts import LossParts
from bitnet_train.training.module import TrainingModule


class ClassificationModule(TrainingModule):
    """Training of a classifier by the cross-entropy of the right class, a mean over the images of a forward pass."""

    NETWORK = "classifier"
    classifier: Classifier

    def __init__(self, cfg: RunConfig, classifier: Classifier, compiled: bool) -> None:
        super().__init__(cfg, classifier, compiled)
        assert isinstance(cfg.loss, CrossEntropyLoss)
        self.loss = cfg.loss

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> LossParts:
        images, labels = batch
        return class_loss(self.classifier(images), labels, self.loss)

    def probe(self, batch: tuple[Tensor, Tensor]) -> None:
        self.classifier(batch[0][:1])
