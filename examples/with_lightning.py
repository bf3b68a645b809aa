"""Co-training as a LightningModule: `python examples/with_lightning.py`, after `pip install . lightning`."""

import lightning
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cotrain import divide, losses

S = 2


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Any data set of (image, label), seen through S augmentations: ([S, C, H, W], label)."""

    def __init__(self, images: Dataset[tuple[Tensor, int]]) -> None:
        self.images = images
        self.augment = v2.Compose([v2.ToDtype(torch.float32), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[place]
        return torch.stack([self.augment(image) for _ in range(S)]), torch.tensor(label)


class CoTraining(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.plan = divide(torchvision.models.resnet18(num_classes=10), S, crop_size=32)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        views_BSCHW, labels_B = batch
        logits_SBK = self.network(views_BSCHW.transpose(0, 1))
        loss_ce = sum(losses.cross_entropy(logits_BK, labels_B).mean() for logits_BK in logits_SBK)
        loss_cot = losses.js_divergence(logits_SBK).mean()
        self.log_dict({"loss_ce": loss_ce, "loss_cot": loss_cot})
        return loss_ce + 0.5 * loss_cot

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images_BCHW, labels_B = batch
        predictions_B = self.network(images_BCHW).mean(dim=0).argmax(dim=-1)
        self.log("ensemble_acc1", 100 * (predictions_B == labels_B).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


if __name__ == "__main__":
    images = torchvision.datasets.FakeData(64, (3, 32, 32), 10, v2.ToImage())
    plain = torchvision.datasets.FakeData(64, (3, 32, 32), 10, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]))
    trainer = lightning.Trainer(
        max_epochs=1, limit_train_batches=3, limit_val_batches=1, accelerator="auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(CoTraining(), DataLoader(Views(images), 16), DataLoader(plain, 16))
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
