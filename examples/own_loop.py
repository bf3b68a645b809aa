"""Co-training in a loop of one's own: `python examples/own_loop.py`, after `pip install .`.

Two networks with the parameters of one ResNet-18, two views of every image, cross-entropy and their agreement.
"""

import torch
import torchvision
from torchvision.transforms import v2

from cotrain import divide, losses

S, STEPS = 2, 3
network, plan = divide(torchvision.models.resnet18(num_classes=10), S, crop_size=32)
print(plan.summary())
optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

for _ in range(STEPS):
    images_BCHW, labels_B = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    views_SBCHW = torch.stack([torch.stack([augment(image) for image in images_BCHW]) for _ in range(S)])
    logits_SBK = network(views_SBCHW)
    loss_ce = sum(losses.cross_entropy(logits_BK, labels_B).mean() for logits_BK in logits_SBK)
    loss = loss_ce + 0.5 * losses.js_divergence(logits_SBK).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

probabilities_BK = network.eval()(images_BCHW).mean(dim=0).softmax(dim=-1)  # one view, all networks
print(f"{len(probabilities_BK)} images classified")
