"""Weights divided over the processes that torchrun started (FSDP 2, arXiv 2304.11277).

Each keeps a share of the weights, gradients and optimizer state, and gathers a layer when it runs. accelerate starts
the processes; its own FSDP plugin is for GPUs alone, so torch's `fully_shard` is used, which runs on CPUs (gloo) as
well. Knows modules and tensors; no data and no loss. In one process nothing is divided.
"""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vlrt.train.system import Trainee


def processes() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def shard(trainee: Trainee, device: torch.device) -> None:
    """Divide a model, in place, by decoder layers and, where they are trained, vision blocks.

    A frozen vision tower stays whole in every process, since which videos are encoded in a step differs among them.
    """
    model, count = trainee.model, processes()[1]
    if count == 1:
        return
    mesh = init_device_mesh(device.type, (count,))
    if model.latent_injection is not None:
        for name, parameter in list(model.latent_injection.named_parameters(recurse=False)):
            if parameter.dim() == 0:  # one number cannot be divided; as a vector of one it can
                vector = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
                setattr(model.latent_injection, name, vector)
    learns = any(parameter.requires_grad for parameter in model.visual.parameters())
    if learns:
        for block in model.visual.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    intact = set() if learns else set(model.visual.parameters())
    # Gathered anew in each forward pass, lest one without gradient (an evaluation, a teacher) leave its weights behind.
    fully_shard(trainee, mesh=mesh, ignored_params=intact, reshard_after_forward=True)
    register_fsdp_forward_method(trainee, "roll_out_told")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on the CPU, without gradient; every process must ask for it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, divided and placed as `like`."""
    tensor = tensor.reshape(like.shape).to(like.device, like.dtype)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def total(values: Tensor) -> Tensor:
    """Return values summed over processes."""
    if processes()[1] > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def clip(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a norm over all of them, in all processes; return the norm they had."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
