"""When a fast path may act: PyTorch runs eagerly, and nobody has put hooks or layers of their own into the model.

There are two kinds of fast paths, and a test for each. A *folded* one computes what a module would compute without
calling it, so the module must be exactly what its class says (`is_plain`). A *packed* one calls every module, but with
fewer tokens than the textbook does, so nobody must look at them from outside, and no module mix them in a way of its
own (`is_unobserved`). Where a test fails, the textbook's way is taken.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Kind = TypeVar("Kind", bound=nn.Module)
_FLOAT = torch.float32
_OURS = f"{__package__.split('.')[0]}."
_OWN = (_OURS, "torch.")
_RECORDERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
# What PyTorch puts around a module, or computes a weight by.
_AROUND = ("torch.distributed.", "torch.nn.parallel.", "torch.nn.utils.", "torch._dynamo.")
# What layers read of themselves. None of it is in an instance's own dictionary, unless somebody put it there.
_READ = ("forward", "weight", "bias", "running_mean", "running_var")
# PyTorch's layers that take each token alone, by what they run: subclasses and parametrized ones may share it.
_TOKENWISE = frozenset(
    layer.forward
    for layer in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Conv2d, nn.Dropout, nn.Identity, nn.ModuleList,
                  nn.ModuleDict, nn.GELU, nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Sigmoid, nn.Tanh)
)  # fmt: skip


def is_eager(x: Tensor) -> bool:
    """Whether operations on `x` run one by one with the shapes that it has now.

    What is recorded (a trace, an export, a graph of torch.fx, a compiled one) runs later with other shapes, so nothing
    may depend on those of the example.
    """
    return not torch.compiler.is_compiling() and is_guarded(x)


def is_guarded(x: Tensor) -> bool:
    """Whether operations on `x` run with the shapes that it has now, or again only where those shapes hold.

    torch.compile compiles again for other shapes; traces and exports do not. Tensors of a class of their own (fake
    ones), placeholders of torch.fx and tensors of torch.func may have no numbers to look at, so this is asked before
    any value of `x` is.
    """
    if torch.compiler.is_compiling() or _is_exporting():
        return not _is_exporting()
    if type(x) not in (Tensor, nn.Parameter) or torch._is_functional_tensor(x):
        return False
    return not (_is_transformed() or _is_recording())


def _is_transformed() -> bool:
    """By a function of torch.func, such as grad and vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_recording() -> bool:
    """By make_fx or AOTAutograd, or with fake tensors; torch.compile runs no module under these."""
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _RECORDERS)


def _is_exporting() -> bool:
    """By torch.export, torch.jit.trace, or either of the exporters to ONNX, which use one of the two."""
    # torch.compile of PyTorch 2.11 takes is_exporting(), which returns this flag, for true.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether operations on these float32 tensors in the CPU's memory may run elsewhere than in PyTorch's functions.

    Nobody may see the difference: no tracer, compiler, exporter, autocast, torch.func, forward-mode differentiation or
    mode that watches operations; no demand for deterministic algorithms, and none to leave oneDNN out.
    """
    for each in tensors:
        if each is None:
            continue
        if type(each) not in (Tensor, nn.Parameter) or not each.is_cpu or each.dtype != _FLOAT:
            return False
        if torch._C._functorch.is_legacy_batchedtensor(each):  # gradients of many directions at once
            return False
    return not (
        torch.compiler.is_compiling()
        or _is_exporting()
        or torch.is_autocast_enabled("cpu")
        or is_in_torch_dispatch_mode()
        or torch._C._is_torch_function_mode_enabled()
        or _is_transformed()
        or forward_ad._current_level >= 0
        or torch.are_deterministic_algorithms_enabled()
        or not torch.backends.mkldnn.enabled
    )


def is_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the precision of operations on `x`."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling the module does what its class says and nothing else.

    False for subclasses (also those that parametrizations and quantization make), for hooks of any kind, for a
    `forward` that somebody put in the instance (as accelerate does) or in the class, and for weights that are computed
    (pruning, weight norm) or are special tensors (sharded, quantized).
    """
    return (
        type(module) is kind
        and not (_has_hooks(module) or _global_hooks())
        and not any(name in module.__dict__ for name in _READ)
        and _is_own(kind.forward)
        and all(type(each) in (Tensor, nn.Parameter) for each in module._parameters.values() if each is not None)
    )


def is_asked(option: Any) -> bool:
    """Whether an option of a forward pass is true.

    torch.fx records the pass for any value of its arguments, and asks for the textbook's way by not knowing them: the
    option is false in its graph, which refuses another value.
    """
    if isinstance(option, torch.fx.Proxy):
        torch._assert(option == False, "this graph was recorded with all options false")  # noqa: E712
        return False
    return bool(option)


def is_unobserved(root: nn.Module, x: Tensor, is_causal: bool = False) -> bool:
    """Whether what runs in `root`, and sees what its modules take and give, is this package's or PyTorch's own.

    Of PyTorch's layers those alone that take each token by itself, and none in place of a block. Hooks of PyTorch's own
    (sharding, pruning) do not look at shapes, so they do not count. An export counts as an observer: its graph is the
    textbook's. A compiled graph is for this process alone, and nobody looks into it.

    Args:
        x: what it runs on; torch.fx's placeholder is recorded for an export.
        is_causal: every attention must be so, too.
    """
    if _is_exporting() or torch.compiler.is_compiling():
        return not _is_exporting()
    if isinstance(x, torch.fx.Proxy):
        return False
    if not (all(map(_is_own, _global_hooks())) and _is_own(F.scaled_dot_product_attention)) or _is_recording():
        return False
    modules: list[tuple[nn.Module | None, bool]] = [(root, True)]
    while modules:  # faster than root.modules()
        module, is_block = modules.pop()
        if module is None:
            continue
        if not _takes_tokens(module.forward, is_block) or (is_causal and not module.__dict__.get("is_causal", True)):
            return False
        if len(module.__dict__.get("normalized_shape", ())) > 1:  # a norm over tokens, too
            return False
        if _has_hooks(module) and not all(_is_own(hook) for hook in _hooks(module)):
            return False
        is_list = type(module) is nn.ModuleList
        modules += [(child, is_list) for child in module._modules.values()]
    return True


def _takes_tokens(forward: Any, is_block: bool) -> bool:
    """Whether a module with this `forward` may be given a part of the tokens, or a block which ones."""
    if not is_block and getattr(forward, "__func__", forward) in _TOKENWISE:
        return True
    return _home(forward).startswith((_OURS, *_AROUND))


def _global_hooks() -> list[Any]:
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return [hook for kind in kinds for hook in getattr(torch_module, f"_global_{kind}").values()]


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _hooks(module: nn.Module) -> list[Any]:
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for hooks in kinds if hooks for hook in hooks.values()]


def _is_own(function: Any) -> bool:
    return _home(function).startswith(_OWN)


def _home(function: Any) -> str:
    return getattr(function, "__module__", None) or type(function).__module__
