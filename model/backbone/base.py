"""What every backbone with stages offers, so that branches, exits and stacking need no knowledge of a family."""

from abc import abstractmethod

from torch import Tensor, nn


class StagedBackbone(nn.Module):
    """A network in the parts stem -> stage 1 ... N -> tail -> classifier.

    Submodule names stay those of `specs/division.md` so that released checkpoints load; these methods give
    the parts one set of names. `forward` is their composition and nothing else.
    """

    @property
    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """The stages in order; stage i maps the feature map of stage i-1 (or the stem) to its own."""

    @abstractmethod
    def stem(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the feature map that stage 1 takes."""

    @abstractmethod
    def tail(self, features_BCHW: Tensor) -> Tensor:
        """The last stage's map -> pooled embedding [B, D] (final norm and activation included, dropout not)."""

    @abstractmethod
    def classify(self, embedding_BD: Tensor) -> Tensor:
        """Embedding [B, D] -> logits [B, K] (classifier dropout included)."""

    @property
    @abstractmethod
    def classifier_name(self) -> str:
        """Name of the submodule that holds the final linear layer ("fc"); re-initialised when fine-tuning."""

    def forward_features(self, images_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images -> (the feature map after each stage, embedding [B, D])."""
        features = self.stem(images_BCHW)
        taps = []
        for stage in self.stages:
            features = stage(features)
            taps.append(features)
        return taps, self.tail(features)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, K]."""
        return self.classify(self.forward_features(images_BCHW)[1])
