"""FSDP2: weights, gradients and optimiser state sliced over the processes (Zhao et al. 2023, arXiv 2304.11277).

Under DDP every process holds all of them. Here each process holds a slice of every parameter, and gathers a block's
whole weights only while the block runs. The steps are the same. `--trainer.strategy fsdp2` selects it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..model import CLIP, ResidualAttentionBlock
from ..resnet import Bottleneck

OLDEST_TORCH = (2, 11)  # before, a block that is computed again in the backward pass finds its norms' weights sliced


def refuse_old_torch(version: str = torch.__version__) -> None:
    """
    Raises:
        ValueError: this PyTorch cannot train with sliced weights.
    """
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ValueError(f"strategy fsdp2 needs PyTorch {oldest} or newer, and this is {version}; update it or use ddp")


def shard(model: CLIP, mesh: DeviceMesh, autocast: torch.dtype | None = None) -> None:
    """Slices every parameter of the towers over the processes of a mesh, block by block, in place.

    The temperature is a single number and stays whole in every process.

    Args:
        autocast: the precision of a mixed run. Matrices of a transformer's block are gathered in it, which halves what
            travels: autocast would round them anyway. Slices, sums over processes and all else stay float32.

    Raises:
        ValueError: see `refuse_old_torch`.
    """
    refuse_old_torch()
    for tensor in (*model.parameters(), *model.buffers()):  # every process slices rank 0's weights
        on_device = tensor.detach().to(mesh.device_type)  # NCCL takes no tensor on the host
        dist.broadcast(on_device, 0, group=mesh.get_group())
        tensor.data.copy_(on_device)
    for tower in (model.visual, model.text):
        for module in tower.modules():
            if autocast is not None and isinstance(module, ResidualAttentionBlock):
                fully_shard([module.ln_1, module.ln_2], mesh=mesh)  # float32, as autocast leaves norms
                policy = MixedPrecisionPolicy(autocast, reduce_dtype=torch.float32, cast_forward_inputs=False)
                fully_shard(module, mesh=mesh, mp_policy=policy)
            elif isinstance(module, ResidualAttentionBlock | Bottleneck):
                fully_shard(module, mesh=mesh)
        fully_shard(tower, mesh=mesh)
    for name, parameter in list(model.named_parameters(recurse=False)):
        whole = DTensor.from_local(parameter.data.to(mesh.device_type), mesh, [Replicate()], run_check=False)
        replicated = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        if parameter.requires_grad:
            replicated.register_post_accumulate_grad_hook(_reduce)
        setattr(model, name, replicated)


def _reduce(parameter: Tensor) -> None:
    """Replaces each process's gradient of a replicated parameter by their mean."""
    assert isinstance(parameter.grad, DTensor)
    parameter.grad = parameter.grad.redistribute(placements=[Replicate()])


def local(parameter: Tensor) -> Tensor:
    """A replicated parameter as a plain tensor for computation; its gradient becomes the mean over the processes."""
    return parameter.to_local(grad_placements=[Partial("avg")]) if isinstance(parameter, DTensor) else parameter


def whole(tensor: Any) -> Any:
    """A sliced tensor gathered, which every process must call; any other value unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_out(tensors: list[Tensor], compute: Callable[[list[Tensor], Sequence[int]], list[Tensor]]) -> list[Tensor]:
    """What `compute` makes of whole tensors, sliced as they are; each process computes a share of the results.

    The slices of a tensor go to the process that it falls to, and those of the result come back. Tensors that are not
    sliced are all computed here.

    Args:
        tensors: of any shapes, all sliced by rows or none.
        compute: from some of the tensors and their indices to results of their shapes.
    """
    if not tensors or not isinstance(tensors[0], DTensor):
        return compute(tensors, range(len(tensors)))
    mesh, placements = tensors[0].device_mesh, tensors[0].placements
    slices = [tensor.to_local() for tensor in tensors if isinstance(tensor, DTensor)]
    rows = [_row_counts(len(tensor), mesh.size()) for tensor in tensors]  # of each tensor, in each process
    ranks, falls_to = range(mesh.size()), [range(rank, len(tensors), mesh.size()) for rank in range(mesh.size())]
    own = falls_to[mesh.get_local_rank()]
    received = _exchange(
        [[slices[i] for i in falls_to[rank]] for rank in ranks],
        [[(rows[i][rank], *tensors[i].shape[1:]) for i in own] for rank in ranks],
        slices[0], mesh,
    )  # fmt: skip
    results = compute([torch.cat(parts) for parts in zip(*received, strict=True)], own)
    pieces = [result.split(rows[i]) for result, i in zip(results, own, strict=True)]
    returned = _exchange(
        [[piece[rank] for piece in pieces] for rank in ranks],
        [[tuple(slices[i].shape) for i in falls_to[rank]] for rank in ranks],
        slices[0], mesh,
    )  # fmt: skip
    by_index = {i: part for rank in ranks for i, part in zip(falls_to[rank], returned[rank], strict=True)}
    return [
        DTensor.from_local(by_index[i], mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
        for i, tensor in enumerate(tensors)
    ]


def _row_counts(count: int, parts: int) -> list[int]:
    """How many of a tensor's rows each process holds; the last ones may hold fewer than the first, or none."""
    most = -(-count // parts)
    return [max(0, min(most, count - most * part)) for part in range(parts)]


def _exchange(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], example: Tensor, mesh: DeviceMesh
) -> list[list[Tensor]]:
    """For each process the tensors that it is sent -> from each process those that it sent, of these shapes."""
    sizes = [[math.prod(shape) for shape in each] for each in shapes]
    flat = torch.cat([example.new_empty(0), *(tensor.flatten() for each in sent for tensor in each)])
    received, own = flat.new_empty(sum(map(sum, sizes))), [sum(t.numel() for t in each) for each in sent]
    dist.all_to_all_single(received, flat, [sum(each) for each in sizes], own, group=mesh.get_group())
    parts = [
        chunk.split(each) for chunk, each in zip(received.split([sum(each) for each in sizes]), sizes, strict=True)
    ]
    return [[part.view(shape) for part, shape in zip(*pair, strict=True)] for pair in zip(parts, shapes, strict=True)]


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Slices a tensor that every process holds whole the way the parameter is sliced."""
    if not isinstance(parameter, DTensor):
        return tensor
    everywhere = DTensor.from_local(tensor.to(parameter.device), parameter.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=parameter.placements)


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy over all processes, with the checkpoints of every other strategy.

    Lightning writes a folder of slices, or one file whose optimiser state is keyed differently from other strategies'.
    This one writes a file that any strategy, with any number of processes, resumes from. What it holds is gathered by
    all processes and kept by the first alone, which writes it.
    """

    def __init__(self, **options: Any) -> None:
        refuse_old_torch()
        super().__init__(**options)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        self._save_distributed_checkpoint = False
        super().setup_environment()

    lightning_restore_optimizer = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return tree_map(_gathered, self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return tree_map(_gathered, Strategy.optimizer_state(self, optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        sliced = {name: like(v, own[name]) if name in own else v for name, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(sliced, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    name: like(v, parameters[number]) if v.shape == parameters[number].shape and name != "step" else v
                    for name, v in values.items()
                }
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _gathered(tensor: Any) -> Any:
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = whole(tensor)  # a collective, so every process calls it
    return gathered.cpu() if dist.get_rank() == 0 else None


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=FSDP2Strategy.__doc__)
