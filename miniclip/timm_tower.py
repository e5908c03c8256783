"""Any image model of timm's as the image tower, with a projection to the shared space.

B batch, E embedding, R resolution.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .common.modules import loads_recorded
from .common.wording import some
from .config import VisionConfig
from .fast.plain import is_asked


class TimmTower(nn.Module):
    """An image model of timm's (`trunk`) and a projection (`head`), named as in OpenCLIP's checkpoints."""

    trunk: Any  # timm's models have no common type

    def __init__(self, config: VisionConfig, embed_dim: int, rates: Mapping[str, float] = MappingProxyType({})) -> None:
        """
        Args:
            rates: timm's, of what is left out at random in training (`drop_path_rate`, `patch_drop_rate`).
        """
        super().__init__()
        import timm  # half a second, which only this tower needs
        from timm.layers.mlp import Mlp

        self.input_resolution = config.image_size
        options: dict[str, Any] = {"global_pool": config.timm_pool} if config.timm_pool else {}
        options |= rates
        try:
            self.trunk = timm.create_model(config.timm_model, num_classes=_num_classes(config, embed_dim), **options)
        except Exception as error:  # of an odd name or pooling anything
            raise ValueError(
                f"timm has no model {config.timm_model!r} with {options or 'its own pooling'}: {error}"
            ) from error
        patches: Any = getattr(self.trunk, "patch_embed", None)
        if getattr(patches, "strict_img_size", False) and patches.img_size != 2 * (config.image_size,):
            raise ValueError(f"{config.timm_model} takes images of {patches.img_size} pixels, not {config.image_size}")
        # Some models have a layer more between what they call features and their classifier.
        width = getattr(self.trunk, "head_hidden_size", None) or self.trunk.num_features
        bias = config.timm_projection_bias
        layers = OrderedDict[str, nn.Module]()
        if config.timm_projection == "linear":
            layers["proj"] = nn.Linear(width, embed_dim, bias=bias)
        elif config.timm_projection == "mlp":
            layers["mlp"] = Mlp(width, 2 * embed_dim, embed_dim, bias=(True, bias))
        elif config.timm_projection == "none" and width != embed_dim:
            raise ValueError(
                f"{config.timm_model} gives {width} channels and embed_dim is {embed_dim}; it needs a projection"
            )
        self.head = nn.Sequential(layers)

    def load_trunk(self, config: VisionConfig, embed_dim: int, file: str | None = None) -> None:
        """Loads pretrained weights into the trunk: timm's, downloaded once, or those of a file with timm's names.

        Raises:
            ValueError: timm has none, they do not fit as a whole, or they need another mean or std than `config` has.
        """
        import timm

        what = f"weights of timm's for {config.timm_model!r}" + (f" in {file}" if file else "")
        pool: dict[str, Any] = {"global_pool": config.timm_pool} if config.timm_pool else {}

        def create() -> Any:
            return timm.create_model(
                config.timm_model,
                pretrained=True,
                pretrained_cfg_overlay={"file": file} if file else None,
                num_classes=_num_classes(config, embed_dim),
                **pool,
            )

        try:
            with loads_recorded() as loads:
                trunk = create()
            again = None
            if file and not loads:  # a loader of the model's own tells nothing
                with torch.random.fork_rng(devices=[]):
                    again = create()
        except Exception as error:  # of downloads and damaged files anything
            raise ValueError(f"no {what}: {error}") from error
        if file:
            self._refuse_other_names(trunk, loads, again, what)
        for name in ("mean", "std"):
            theirs, ours = tuple(trunk.pretrained_cfg[name]), getattr(config, name)
            if any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
                raise ValueError(
                    f"{what} need images of {name} {theirs}; set model.clip.vision.{name}, which is {ours}"
                )
        self.trunk.load_state_dict(trunk.state_dict())

    @staticmethod
    def _refuse_other_names(trunk: Any, loads: list[Any], again: Any | None, what: str) -> None:
        """Raises a ValueError for a file that lacks tensors of the trunk, or has more blocks: timm only logs that.

        Args:
            again: the same once more; what of it differs, NaN too, is not from the file.
        """
        tensors, classifier = trunk.state_dict(), trunk.pretrained_cfg.get("classifier") or ()
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        lacking = [n for load in loads for n in load.missing_keys if not n.startswith(heads)]
        found = tensors if again is None else again.state_dict()
        lacking += [n for n, tensor in tensors.items() if not n.startswith(heads) and not tensor.equal(found[n])]
        if lacking:
            raise ValueError(
                f"no {what}: it has no {some(lacking)}, or not as numbers; it must be a state dict by timm's names"
            )
        own = {_without_numbers(name) for name in tensors}
        over = [name for load in loads for name in load.unexpected_keys if _without_numbers(name) in own]
        if over:
            raise ValueError(f"no {what}: it has blocks that this model lacks, so it is a larger one's: {some(over)}")

    def checkpoint_blocks(self) -> None:
        """In training, timm's blocks keep only their inputs from now on, and are computed again for the gradient.

        Raises:
            ValueError: timm can't do that for this model, or its batch norms would count each batch twice.
        """
        name = type(self.trunk).__name__
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.trunk.modules()):
            raise ValueError(
                f"model.checkpoint_activations: timm's {name} has batch norms, which would count each batch twice; "
                "model.micro_batch_size saves memory without that"
            )
        try:
            self.trunk.set_grad_checkpointing()
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"model.checkpoint_activations: timm can't do that for {name}; model.micro_batch_size saves memory, too"
            ) from error

    def forward(self, images: Tensor, all_tokens: bool = False) -> Tensor:
        """Normalised images (B, 3, R, R) -> (B, E). With `all_tokens` -> the model's features before pooling.

        The model decides on their shape: (B, tokens, width) of most transformers, (B, width, H, W) of most others.
        """
        return self.trunk.forward_features(images) if is_asked(all_tokens) else self.head(self.trunk(images))


def _without_numbers(name: str) -> str:
    """Equal for tensors of blocks that are alike: layer1.0.bn1.bias, layer1.2.bn2.bias."""
    return re.sub(r"\d+", "#", name)


def _num_classes(config: VisionConfig, embed_dim: int) -> int:
    """Outputs of the model's own classifier, which may serve as the projection; 0 leaves it out."""
    return embed_dim if config.timm_projection == "classifier" else 0
