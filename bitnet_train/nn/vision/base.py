"""What all image classifiers have."""

from torch import Tensor, nn

from bitnet_train.nn.vision.config import ClassifierConfig
from bitnet_train.quant.spec import QuantSpec


class Classifier(nn.Module):
    """Images to logits; ``cfg`` and ``spec`` say what it is made of."""

    def __init__(self, cfg: ClassifierConfig, spec: QuantSpec) -> None:
        super().__init__()
        self.cfg, self.spec = cfg, spec

    def forward(self, images: Tensor) -> Tensor:
        """images (batch, channels, height, width) -> logits (batch, classes), in the type of the last matmul."""
        raise NotImplementedError
