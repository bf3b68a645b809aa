"""Co-training under torch.compile: `python examples/compiled.py [BACKEND]`, after `pip install .`."""

import sys

import torch
import torchvision

from cotrain import divide, losses

S, STEPS = 2, 3
network, plan = divide(torchvision.models.resnet18(num_classes=10), S, crop_size=32)
compiled = torch.compile(network, backend=sys.argv[1] if len(sys.argv) > 1 else "inductor", fullgraph=True)
optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

for _ in range(STEPS):
    views_SBCHW, labels_B = torch.randn(S, 8, 3, 32, 32), torch.randint(10, (8,))
    logits_SBK = compiled(views_SBCHW)
    loss_ce = sum(losses.cross_entropy(logits_BK, labels_B).mean() for logits_BK in logits_SBK)
    loss = loss_ce + 0.5 * losses.js_divergence(logits_SBK).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

network.eval()
with torch.no_grad():
    difference = (compiled(views_SBCHW) - network(views_SBCHW)).abs().max()
print(f"compiled and not: {difference.item():.1e} apart")
