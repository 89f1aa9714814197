"""Trains a network that no process holds whole: `torchrun --nproc_per_node 2 docs/fsdp2.py` (on CPUs: gloo)."""

import timm
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import timm_metricconv  # noqa: F401  registers the models

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
with torch.device("meta"):  # no memory yet
    model = timm.create_model("test_resnet_metric", num_classes=10)
for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
    fully_shard(stage)
fully_shard(model).to_empty(device=device)
for module in model.modules():
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()

optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(dist.get_rank())  # each process has images of its own
images, labels = torch.randn(8, 3, 64, 64, device=device), torch.randint(10, (8,), device=device)
for _ in range(10):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()

state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    timm.create_model("test_resnet_metric", num_classes=10).load_state_dict(state)
    print(f"loss {loss:.2f}, and the whole state dict loads into a plain network")
dist.destroy_process_group()
