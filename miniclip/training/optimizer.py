"""How the parameters move: parameter groups, optimisers, and the learning rate's schedule."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..model import CLIP, Attention, ResidualAttentionBlock, Transformer
from ..resnet import Bottleneck
from ..timm_tower import TimmTower
from .muon import Muon

OptimizerKind = Literal["adamw", "muon", "timm"]
Schedule = Literal["cosine", "linear", "constant"]
WarmupUnit = Literal["share", "steps", "samples", "epochs"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest, or any of timm's optimisers.

    AdamW's defaults are the paper's for ViT (tables 18 and 19).

    Args:
        kind: "adamw"; "muon", which learns far faster on small models from scratch; or "timm", see `timm_name`.
        lr: AdamW's peak learning rate, or that of timm's optimiser.
        betas, eps: AdamW's; those of timm's optimisers are in `options`.
        weight_decay: AdamW's or timm's; applied to weights, never to gains, biases, and the logit scale.
        muon_lr: Muon's peak learning rate: the size of an update's singular values.
        muon_weight_decay: Muon's.
        muon_momentum: Muon's (Nesterov).
        warmup: how long the learning rates rise from 0, in `warmup_unit`.
        warmup_unit: "share" of the run, "steps", "samples" or "epochs".
        schedule: how the rates fall from the warm-up to the end of the run: "cosine", "linear", or "constant", which
            holds them until the last `cooldown` of the run and then falls linearly.
        cooldown: share of the run in which a constant schedule falls (a trapezoid; Zhai et al. 2021).
        final_lr: the rates at the end, as a share of the peak.
        layer_decay: factor on the rates from each layer to the one below it (BEiT, Bao et al. 2021), so that
            fine-tuning moves lower layers less. Projections, everything above the blocks, and the logit scale have
            the full rate.
        image_lr_scale, text_lr_scale: factor on the rates of a whole tower.
        timm_name: timm's name of the optimiser, for kind "timm"; the prefix `lookahead_` is allowed.
        options: further arguments of timm's optimiser, by name.
    """

    kind: OptimizerKind = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    muon_lr: float = 0.03
    muon_weight_decay: float = 0.1
    muon_momentum: float = 0.9
    warmup: float = 0.1
    warmup_unit: WarmupUnit = "share"
    schedule: Schedule = "cosine"
    cooldown: float = 0.0
    final_lr: float = 0.0
    layer_decay: float = 1.0
    image_lr_scale: float = 1.0
    text_lr_scale: float = 1.0
    timm_name: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("kind", OptimizerKind), ("schedule", Schedule), ("warmup_unit", WarmupUnit)):
            self._require(name, getattr(self, name) in get_args(choices), f"valid are {', '.join(get_args(choices))}")
        if self.warmup_unit == "share":
            self._require("warmup", 0 <= self.warmup < 1, "it is a share of the run, 0 to below 1 (see warmup_unit)")
        self._require("warmup", 0 <= self.warmup < math.inf, "it must be 0 or more")
        for name in ("lr", "muon_lr", "image_lr_scale", "text_lr_scale"):
            self._require(name, 0 < getattr(self, name) < math.inf, "it must be above 0")
        for name in ("weight_decay", "muon_weight_decay"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "it must be 0 or more")
        for name in ("cooldown", "final_lr"):
            self._require(name, 0 <= getattr(self, name) <= 1, "it is a share, 0 to 1")
        self._require("muon_momentum", 0 <= self.muon_momentum < 1, "it must be from 0 to below 1")
        self._require("layer_decay", 0 < self.layer_decay <= 1, "it must be above 0 and at most 1")
        is_constant = self.schedule == "constant"
        self._require("cooldown", is_constant or not self.cooldown, f"a {self.schedule} schedule has none")
        self._require(
            "final_lr",
            not is_constant or self.cooldown or not self.final_lr,
            "a constant schedule needs a cooldown to fall",
        )
        self._require(
            "timm_name",
            (self.kind == "timm") == bool(self.timm_name),
            f"kind is {self.kind}; kind timm, and no other, needs a name",
        )
        self._require(
            "options", self.kind == "timm" or not self.options, f"only kind timm has options, and kind is {self.kind}"
        )
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("betas", "eps"):
            is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
            self._require(
                name,
                self.kind != "timm" or is_default,
                "kind timm does not use it; give it in options, and leave it out here",
            )
        if self.kind == "timm":  # mistakes show now, before a run is prepared
            _timm_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))]}], self)

    def _require(self, name: str, is_right: object, otherwise: str) -> None:
        if not is_right:
            raise ValueError(f"OptimizerConfig.{name} is {getattr(self, name)!r}; {otherwise}")


def parameter_groups(model: CLIP, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, each with its own rate and decay.

    Gains, biases and the logit scale (all that has fewer than two dimensions) do not decay (paper section 2.5).
    """
    matrices = {id(p) for p in block_matrices(model)} if config.kind == "muon" else set()
    trainable = [p for p in model.parameters() if p.requires_grad]
    muon = [p for p in trainable if id(p) in matrices]
    rest = [p for p in trainable if id(p) not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [{"lr": config.lr, "momentum": None, **group} for group in groups]
    stacked = {id(module.in_proj_weight) for module in model.modules() if isinstance(module, Attention)}
    settings = {"lr": config.muon_lr, "weight_decay": config.muon_weight_decay, "momentum": config.muon_momentum}
    # `parts`: how many matrices are stacked in a parameter, as queries, keys and values are.
    groups.append({"params": [p for p in muon if id(p) in stacked], "parts": 3, **settings})
    groups.append({"params": [p for p in muon if id(p) not in stacked], "parts": 1, **settings})
    scales = rate_scales(model, config)
    return [part for group in groups for part in _by_rate(group, scales)]


def _by_rate(group: dict[str, Any], scales: dict[int, float]) -> Iterator[dict[str, Any]]:
    """Splits a group by the learning rates of its parameters, the highest first."""
    for scale in sorted({scales[id(p)] for p in group["params"]}, reverse=True):
        params = [p for p in group["params"] if scales[id(p)] == scale]
        yield {**group, "params": params, "lr": group["lr"] * scale}


def block_matrices(model: CLIP) -> Iterator[Tensor]:
    """The two-dimensional parameters inside the transformers' blocks."""
    for module in model.modules():
        if isinstance(module, Transformer):
            yield from (p for p in module.parameters() if p.ndim == 2)


def rate_scales(model: CLIP, config: OptimizerConfig) -> dict[int, float]:
    """id of each parameter -> factor on its rate: the tower's, times the decay to the power of the layers above it."""
    scales = {id(parameter): 1.0 for parameter in model.parameters()}
    for tower, scale in ((model.visual, config.image_lr_scale), (model.text, config.text_lr_scale)):
        above = layers_above(tower) if config.layer_decay != 1 else {}
        for name, parameter in tower.named_parameters():
            scales[id(parameter)] = scale * config.layer_decay ** above.get(name, 0)
    return scales


def layers_above(tower: nn.Module) -> dict[str, int]:
    """Name of each parameter of a tower -> the number of layers above it.

    A layer is a block (in a ResNet a bottleneck), or everything below the first block. Pooling, the last norm and the
    projection have no layer above. timm knows the layers of its own models.

    Raises:
        ValueError: timm does not know the layers of its image tower.
    """
    if isinstance(tower, TimmTower):
        return _layers_above_in_timms(tower)
    blocks = [(name, m) for name, m in tower.named_modules() if isinstance(m, ResidualAttentionBlock | Bottleneck)]
    above = {}
    for name, _ in tower.named_parameters():
        if name.startswith(_TOP):
            above[name] = 0
        else:
            inside = [i for i, (block, _) in enumerate(blocks) if name.startswith(f"{block}.")]
            above[name] = len(blocks) - inside[0] if inside else len(blocks) + 1
    return above


_TOP = ("ln_post.", "proj", "ln_final.", "text_projection", "attnpool.")


def _layers_above_in_timms(tower: TimmTower) -> dict[str, int]:
    from timm.models import group_parameters  # the tower was built with timm, so it is there

    trunk = tower.trunk
    if not hasattr(trunk, "group_matcher"):
        raise ValueError(
            f"OptimizerConfig.layer_decay needs the layers of {type(trunk).__name__}, which timm does not define; set "
            "it to 1"
        )
    # timm puts modules of no layer, such as a classifier, above all layers; the projection takes its place here.
    whole = nn.Module()
    for name, parameter in trunk.named_parameters(recurse=False):
        whole.register_parameter(name, parameter)
    for name, module in [*trunk.named_children(), ("projection", nn.Linear(1, 1, bias=False))]:
        whole.add_module(name, module)
    layer = group_parameters(whole, trunk.group_matcher(coarse=False), reverse=True)
    top = layer.pop("projection.weight")
    above = {f"trunk.{name}": top - index for name, index in layer.items()}
    return above | {f"head.{name}": 0 for name, _ in tower.head.named_parameters()}


def make_optimizer(model: CLIP, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    if config.kind == "timm":
        return _timm_optimizer(groups, config)
    # One kernel for all parameters; torch has it for these devices and refuses to step on any other.
    is_fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    return Muon(groups, lr=config.lr, fused=is_fused or None, **options)


def _timm_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """timm's optimiser `timm_name`, with the groups' own rates and decays.

    Raises:
        ValueError: timm does not know the name, or the optimiser refuses its options.
    """
    name = config.timm_name
    timm_optim: Any = importlib.import_module("timm.optim")  # half a second, which only this kind needs
    plain, known = name.removeprefix("lookahead_"), timm_optim.list_optimizers()
    if plain not in known:
        near = difflib.get_close_matches(plain, known, n=5, cutoff=0.5)
        did_you_mean = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"OptimizerConfig.timm_name is {name!r}, which timm does not have; {did_you_mean}")
    if timm_optim.get_optimizer_info(plain).second_order:
        raise ValueError(f"OptimizerConfig.timm_name is {name!r}, which needs second derivatives; training has none")
    if doubled := sorted({"lr", "weight_decay"} & config.options.keys()):
        raise ValueError(f"OptimizerConfig.options has {doubled[0]!r}; set OptimizerConfig.{doubled[0]} instead")
    # `momentum: None` marks a group as not Muon's; timm would take it for its own momentum.
    groups = [{key: value for key, value in group.items() if key != "momentum"} for group in groups]
    try:
        return timm_optim.create_optimizer_v2(groups, name, lr=config.lr, **config.options)
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"timm's optimiser {name!r} refuses options {config.options}: {error}") from error


class CommonSchedule(torch.optim.lr_scheduler.LambdaLR):
    """One factor on the learning rates of all groups. A group that is added during the run begins with the rate that it
    was given, which then rises and falls with the others'."""

    def get_lr(self) -> list[float | Tensor]:
        factor = self.lr_lambdas[0]
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            before = factor(self.last_epoch - 1)
            self.base_lrs.append(group["lr"] / before if before else 0.0)
        return [lr * factor(self.last_epoch) for lr in self.base_lrs]


def warmup_steps(config: OptimizerConfig, total_steps: int, batch_size: int, steps_per_epoch: float) -> int:
    """The number of steps in which the learning rates rise.

    Raises:
        ValueError: the run, or the part before the cooldown, is not longer than the warm-up; or that is a part of one
            step.
    """
    per_unit = {"share": total_steps, "steps": 1, "samples": 1 / batch_size, "epochs": steps_per_epoch}
    steps = round(config.warmup * per_unit[config.warmup_unit])
    warmup = f"OptimizerConfig.warmup is {config.warmup:g} ({config.warmup_unit}), which is {steps} steps"
    if config.warmup and not steps and config.warmup_unit != "share":
        raise ValueError(f"{warmup}: give it at least one step, 0 for no warm-up, or leave warmup_unit out for a share")
    if steps >= max(1, total_steps):
        raise ValueError(f"{warmup}, and the run has {total_steps}: the learning rate would never reach its peak")
    if steps + round(config.cooldown * total_steps) > total_steps:
        raise ValueError(f"{warmup}, and cooldown {config.cooldown} of {total_steps} begins before they are over")
    return steps


def learning_rate_factor(
    step: int, total_steps: int, warmup_steps: int, schedule: Schedule = "cosine", cooldown: float = 0, final: float = 0
) -> float:
    """Factor on the learning rate at a step: rises linearly in the warm-up, holds if constant, and falls to `final`.

    Args:
        cooldown: share of the run in which a constant schedule falls linearly.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    begin = total_steps - round(cooldown * total_steps) if schedule == "constant" else warmup_steps
    fallen = (min(step, total_steps) - begin) / max(1, total_steps - begin)
    left = 1 - max(0.0, fallen) if schedule != "cosine" else 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))
    return final + (1 - final) * left
