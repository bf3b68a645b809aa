"""Co-training under plain DDP: `torchrun --standalone --nproc_per_node 2 examples/ddp.py`, after `pip install .`.

The SplitNet is one module like any other: DDP averages its gradients, and every process makes its own views.
"""

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel

from cotrain import divide, losses

S, STEPS = 2, 3
use_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if use_gpu else "gloo")
device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if use_gpu else torch.device("cpu")
network, plan = divide(torchvision.models.resnet18(num_classes=10), S, crop_size=32)  # alike in every process: by seed
if dist.get_rank() == 0:
    print(plan.summary())
parallel = DistributedDataParallel(network.to(device))
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01, momentum=0.9)

torch.manual_seed(dist.get_rank())  # other images in every process
for _ in range(STEPS):
    views_SBCHW = torch.randn(S, 8, 3, 32, 32, device=device)
    labels_B = torch.randint(10, (8,), device=device)
    logits_SBK = parallel(views_SBCHW)
    loss_ce = sum(losses.cross_entropy(logits_BK, labels_B).mean() for logits_BK in logits_SBK)
    loss = loss_ce + 0.5 * losses.js_divergence(logits_SBK).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

total = torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).double().sum()
totals = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
dist.all_gather(totals, total)
if dist.get_rank() == 0:
    print("the same weights in every process:", all(bool(one == totals[0]) for one in totals))
dist.barrier()  # nobody leaves while another still talks to it
dist.destroy_process_group()
