"""Less memory or work in training, added to the towers from outside: recomputation, micro-batches, patch dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model import CLIP, ResidualAttentionBlock, VisionTransformer
from ..resnet import Bottleneck, ModifiedResNet
from ..timm_tower import TimmTower


def recomputed(function: Callable[..., Any], *inputs: Any, within: nn.Module) -> Any:
    """function(*inputs), with activations recomputed for the gradient instead of kept (Chen et al. 2016).

    The recomputation draws the same random numbers, and the batch norms in `within` count the batch once.
    """
    if torch.compiler.is_compiling():  # the compiler updates buffers once, and takes no contexts
        return checkpoint(function, *inputs, use_reentrant=False)
    contexts = lambda: (nullcontext(), _running_statistics_held(within))  # noqa: E731 (first time, second time)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _running_statistics_held(model: nn.Module) -> Iterator[None]:
    """Lets batch norms count into copies that are thrown away; switching the counting off would change their output."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    held = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in held:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in held:
            setattr(norm, name, buffer)


def recompute_blocks(model: CLIP) -> None:
    """From now on, in training, the towers' blocks keep only their inputs and recompute the rest for the gradient.

    Raises:
        ValueError: from `TimmTower.checkpoint_blocks`.
    """
    for module in model.modules():
        if isinstance(module, ResidualAttentionBlock | Bottleneck):
            module.forward = _Recomputed(module, "forward")  # type: ignore[assignment,method-assign]
        elif isinstance(module, ModifiedResNet):
            module.stem = _Recomputed(module, "stem")  # type: ignore[assignment,method-assign]
        elif isinstance(module, TimmTower):
            module.checkpoint_blocks()


class _Recomputed:
    """A method of a module's class, recomputed in training; a bound function could not be pickled with the module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *inputs: Any) -> Any:
        method = getattr(type(self.module), self.name)
        if self.module.training and torch.is_grad_enabled():
            return recomputed(method, self.module, *inputs, within=self.module)
        return method(self.module, *inputs)


def encode_in_parts(encode: Callable[[Tensor], Tensor], inputs: Tensor, size: int, within: nn.Module | None) -> Tensor:
    """Encodes micro-batches of `size` inputs, each recomputed for its gradient: (B, …) -> (B, E).

    With the loss over all B features behind it this is GradCache (Gao et al. 2021): exact gradients of the whole
    batch, with the activations of one micro-batch in memory.

    Args:
        within: the model that `encode` runs; None if nothing in it is trained, so that no activations are kept anyway.
    """
    parts = inputs.split(size)
    if within is None:
        return torch.cat([encode(part) for part in parts])
    return torch.cat([recomputed(encode, part, within=within) for part in parts])


def drop_patches_in_training(model: CLIP, share: float) -> None:
    """From now on, in training, the transformer of a ViT image tower sees a random part of the patches.

    Args:
        share: of the patches that are left out.
    """

    assert isinstance(model.visual, VisionTransformer)
    model.visual.transformer.register_forward_pre_hook(_Dropping(share), with_kwargs=True)


class _Dropping:
    """A hook that can be pickled with its model."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> Any:
        is_pooled = "pool" in options  # a caller that wants all tokens names none, and gets all
        if module.training and is_pooled:
            return (drop_patches(inputs[0], self.share),), options
        return None


def drop_patches(x: Tensor, share: float) -> Tensor:
    """Drops a random share of each image's patches (Li et al. 2022, section 3.1): (B, N, D) -> (B, 1 + kept, D).

    The class token, at index 0, stays. The device's own generator draws the indices, so the host does not wait.
    """
    B, N, _ = x.shape
    kept = max(1, round((N - 1) * (1 - share)))
    order = torch.rand(B, N - 1, device=x.device).argsort(dim=1)
    indices = F.pad(1 + order[:, :kept], (1, 0)) + N * torch.arange(B, device=x.device)[:, None]  # (B, 1 + kept)
    # x[rows, indices] would sort for its gradient; here no row is taken twice.
    return x.flatten(0, 1).index_select(0, indices.flatten()).unflatten(0, indices.shape)
