"""open_clip's model in our code: its names, keys, shapes and conventions, over the modules of `openai`.

Differences from `openai`: transformers take (B, N, D) and their mask as an argument, calling a model gives unit
features and the exponentiated scale, image towers may be timm's. N tokens, B batch, D width, E embedding, R resolution.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import openai, resnet
from .config import CLIP_LOGIT_SCALE, Activation, CLIPConfig, VisionConfig
from .model import pick, project
from .timm_tower import TimmTower
from .weights.architecture import config_from_openclip, side_of_square
from .weights.write import openclip_settings


class _Explained(openai.Explained):
    explained_as = ("open_clip's", "miniclip.openclip")


# A program may put classes of its own in place of these and of those below, with open_clip's arguments: models are made
# of what stands here when they are made, and `openclip` puts here what is put into it.
AttentionPool2d, LayerNorm, QuickGELU = openai.AttentionPool2d, openai.LayerNorm, openai.QuickGELU


def _layer_called(name: Activation) -> type[nn.Module]:
    return nn.GELU if name == "gelu" else QuickGELU


# Arguments of open_clip's classes, and the values that these classes have.
_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("attentional_pool", "final_ln_after_pool", "is_cross_attention", "no_ln_pre", "qk_norm"), (False,)
    ),
    **dict.fromkeys(("scale_attn", "scale_attn_inner", "scale_fc", "scale_heads", "scaled_cosine_attn"), (False,)),
    "batch_first": (True,),
    "block_type": (None, "default"),
    "pool_type": ("tok",),
    "pos_embed_type": ("learnable",),
    "pretrained": (False,),
}
# The last arguments of its transformers, in their order.
_OF_BLOCKS = [
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
]


def _from_places(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Arguments that were given by their places, by their names."""
    if len(values) > len(names):
        raise TypeError(f"{len(values) - len(names)} arguments more than open_clip's, which end with {names[-1]}")
    return dict(zip(names, values, strict=False))


def _refuse_other_parts(kind: str, **others: Any) -> None:
    for name, value in others.items():
        if name not in _ONLY:
            raise TypeError(f"{kind} has no argument {name!r}")
        if value not in _ONLY[name]:
            valid = " or ".join(map(repr, _ONLY[name]))
            raise ValueError(
                f"{name} is {value!r}; {kind} of miniclip.openclip has {valid}, open_clip itself has others"
            )


def refuse_foreign(config: CLIPConfig, name: str) -> None:
    if config.towers != "both":
        raise ValueError(f"{name} has the {config.towers} tower alone; open_clip's models have both (miniclip.load)")
    if config.text.eot_token not in (None, config.text.vocab_size - 1):
        raise ValueError(
            f"{name} ends texts with {config.text.eot_token}, and miniclip.openclip reads them at the largest id; "
            "miniclip.load takes it"
        )


def text_global_pool(
    x: Tensor, text: Tensor | None = None, pool_type: str = "argmax", eos_token_id: int | None = None
) -> Tensor:
    """A token of each row: (B, N, D), (B, N) -> (B, D); all of them, for a `pool_type` that is none of the four."""
    if pool_type in ("first", "last"):
        return x[:, 0 if pool_type == "first" else -1]
    if pool_type not in ("argmax", "eos"):
        return x
    if text is None or (pool_type == "eos" and eos_token_id is None):
        raise ValueError(f"pool_type is {pool_type!r}, which needs text{', and eos_token_id' * (pool_type == 'eos')}")
    is_end = text if pool_type == "argmax" else text.eq(eos_token_id or 0).int()
    return pick(x, is_end.argmax(dim=-1))


def _expand_token(token: Tensor, batch_size: int) -> Tensor:
    """(D,) -> (B, 1, D)."""
    return token.view(1, 1, -1).expand(batch_size, -1, -1)


_HOOKS = "register_forward_hook of {} gives what each computes"


def _unlock_last(groups: Sequence[Sequence[Any]], num_unlocked: int) -> None:
    """Has the last groups of modules and parameters learn, and the others not."""
    for number, group in enumerate(groups):
        for part in group:
            part.requires_grad_(number >= len(groups) - num_unlocked)


def freeze_batch_norm_2d(module: nn.Module, module_match: Collection[str] = ()) -> nn.Module:
    """Puts norms that neither learn nor count in place of batch norms: those named in `module_match`, or all.

    Returns:
        The module, changed in place; or its replacement, where it is a norm itself.
    """
    from torchvision.ops import FrozenBatchNorm2d  # a second, and only this needs it

    for name, norm in list(module.named_modules()):
        if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or (module_match and name not in module_match):
            continue
        frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.running_mean)
        frozen.load_state_dict(norm.state_dict(), strict=norm.affine)
        if not name:
            return frozen
        parent, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(parent), own_name, frozen)
    return module


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021, "Going deeper with image transformers")."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace, self.gamma = inplace, nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class PatchDropout(nn.Module):
    """In training, a random part of each image's patches: (B, N, D) -> (B, kept, D) (Li et al. 2022, section 3.1)."""

    def __init__(self, prob: float = 0.5, exclude_first_token: bool = True) -> None:
        super().__init__()
        if not (isinstance(prob, int | float) and 0 <= prob < 1):
            raise ValueError(f"patch_dropout is {prob!r}; it is the share that is left out, 0 to below 1")
        self.prob, self.exclude_first_token = prob, exclude_first_token

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.prob:
            return x
        first, patches = x.split([1, x.shape[1] - 1], dim=1) if self.exclude_first_token else (x[:, :0], x)
        B, N, D = patches.shape
        kept = torch.randn(B, N, device=x.device).topk(max(1, int(N * (1 - self.prob))), dim=-1).indices
        return torch.cat([first, patches.gather(1, kept[..., None].expand(-1, -1, D))], dim=1)

    def extra_repr(self) -> str:
        return f"prob={self.prob}"


class ResidualAttentionBlock(openai.ResidualAttentionBlock):
    """(B, N, D) -> (B, N, D)."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        is_cross_attention: bool = False,
        batch_first: bool = True,
    ) -> None:
        _refuse_other_parts("ResidualAttentionBlock", is_cross_attention=is_cross_attention, batch_first=batch_first)
        super().__init__(d_model, n_head, mlp_ratio=mlp_ratio)
        self.attn.batch_first = True
        self.mlp.gelu = act_layer()
        self.ln_1, self.ln_2 = (norm_layer(d_model) for _ in range(2))  # type: ignore[assignment]
        self.ls_1, self.ls_2 = (
            nn.Identity() if ls_init_value is None else LayerScale(d_model, ls_init_value) for _ in range(2)
        )
        for name in ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"):  # as optimizers' states count parameters
            self._modules[name] = self._modules.pop(name)

    def get_weight_dtype(self) -> torch.dtype:
        layer: Any = self.mlp.c_fc
        weight = layer.weight
        return weight.dtype if isinstance(weight, Tensor) else torch.float32  # of a quantized layer, a function

    def attention(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Of q_x to k_x and v_x, which are q_x if they are None."""
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        k_x, v_x = (q_x if each is None else each for each in (k_x, v_x))
        return self.attn(q_x, k_x, v_x, need_weights=False, attn_mask=mask)[0]

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        if not (k_x is None and v_x is None):
            warnings.warn("k_x and v_x are ignored, as open_clip does in a block of a CLIP", stacklevel=2)
        x = q_x + self.ls_1(self.attention(self.ln_1(q_x), attn_mask=attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(_Explained):
    """(B, N, D) -> (B, N, D)."""

    batch_first = True
    instead = {  # noqa: RUF012
        "forward_intermediates": _HOOKS.format("`resblocks[i]`"),
        "prune_intermediate_layers": "`resblocks = resblocks[:n]` keeps the first n",
    }

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        *later: Any,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse_other_parts("Transformer", **_from_places(["batch_first", *_OF_BLOCKS], later), **others)
        self.width, self.layers, self.grad_checkpointing = width, layers, False
        options: dict[str, Any] = {"ls_init_value": ls_init_value, "act_layer": act_layer, "norm_layer": norm_layer}
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, **options) for _ in range(layers)
        )

    def get_cast_dtype(self) -> torch.dtype:
        block: Any = self.resblocks[0]
        return block.get_weight_dtype()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x


class VisionTransformer(_Explained, openai.VisionTransformer):
    """(B, 3, R, R) -> (B, E); with `output_tokens` also the patches (B, N - 1, D), normed and not projected."""

    attn_pool, pool_type, final_ln_after_pool = None, "tok", False
    instead = {  # noqa: RUF012
        "forward_intermediates": _HOOKS.format("`transformer.resblocks[i]`"),
        "prune_intermediate_layers": "`transformer.resblocks = transformer.resblocks[:n]` keeps the first n",
    }

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        ls_init_value: float | None = None,
        attentional_pool: bool = False,
        attn_pooler_queries: int = 256,  # without effect, as there is no pool
        attn_pooler_heads: int = 8,
        output_dim: int = 512,
        patch_dropout: float = 0.0,
        no_ln_pre: bool = False,
        pos_embed_type: str = "learnable",
        pool_type: str = "tok",
        final_ln_after_pool: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        output_tokens: bool = False,
        *of_blocks: Any,
        **others: Any,
    ) -> None:
        of_tower = {"attentional_pool": attentional_pool, "no_ln_pre": no_ln_pre, "pos_embed_type": pos_embed_type}
        of_tower |= {"pool_type": pool_type, "final_ln_after_pool": final_ln_after_pool}
        _refuse_other_parts("VisionTransformer", **of_tower, **_from_places(_OF_BLOCKS, of_blocks), **others)
        R, P = side_of_square("image_size", image_size), side_of_square("patch_size", patch_size)
        nn.Module.__init__(self)  # what follows draws in open_clip's order, so that a seed gives its weights
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, P, stride=P, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((R // P) ** 2 + 1, width))
        self.patch_dropout = PatchDropout(patch_dropout) if patch_dropout else nn.Identity()
        self.ln_pre = norm_layer(width)  # type: ignore[assignment]
        self.transformer = Transformer(  # type: ignore[assignment]
            width, layers, heads, mlp_ratio, ls_init_value, act_layer, norm_layer
        )
        self.ln_post = norm_layer(width)  # type: ignore[assignment]
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))
        self.input_resolution, self.output_dim, self.output_tokens = R, output_dim, output_tokens
        self.image_size, self.patch_size, self.grid_size = (R, R), (P, P), (R // P, R // P)

    def init_parameters(self) -> None:
        """Does nothing, as open_clip's."""

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes all but the last groups: embeddings and ln_pre; a group for each block, the last with ln_post; proj.

        There are no batch norms to freeze.
        """
        *blocks, last = self.transformer.resblocks
        embeddings = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        projection = [] if self.proj is None else [[self.proj]]
        self.requires_grad_(False)
        _unlock_last([embeddings, *([block] for block in blocks), [last, self.ln_post], *projection], unlocked_groups)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        return {"positional_embedding", "class_embedding"}

    def _embeds(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, D)
        x = torch.cat([_expand_token(self.class_embedding, x.shape[0]).to(x.dtype), x], dim=1)  # (B, N, D)
        return self.ln_pre(self.patch_dropout(x + self.positional_embedding.to(x.dtype)))

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.final_ln_after_pool:
            return self._global_pool(self.ln_post(x))
        pooled, tokens = self._global_pool(x)
        return self.ln_post(pooled), tokens

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By `pool_type`, which a program may set: "tok", "avg", or another for all tokens twice."""
        if self.pool_type not in ("tok", "avg"):
            return x, x
        return x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(dim=1), x[:, 1:]

    def forward(self, x: Tensor) -> Any:
        pooled, tokens = self._pool(self.transformer(self._embeds(x)))
        pooled = project(pooled, self.proj)
        return (pooled, tokens) if self.output_tokens else pooled


class _WithActNames(_Explained):
    """Has open_clip's names of a ResNet's activations, `act1` to `act3`; the code that computes has OpenAI's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._modules = {name.replace("relu", "act"): module for name, module in self._modules.items()}

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name.replace("relu", "act") if name in ("relu1", "relu2", "relu3") else name)


class Bottleneck(_WithActNames, resnet.Bottleneck):
    pass


class ModifiedResNet(_WithActNames, openai.ModifiedResNet):
    instead = {  # noqa: RUF012
        "forward_intermediates": _HOOKS.format("`layer1` to `layer4`"),
        **openai.ModifiedResNet.instead,
    }

    def __init__(
        self, layers: Sequence[int], output_dim: int, heads: int, image_size: int = 224, width: int = 64
    ) -> None:
        super().__init__(layers, output_dim, heads, image_size, width)
        self.image_size = image_size
        self.init_parameters()

    @property
    def block(self) -> type[Bottleneck]:  # type: ignore[override]
        return Bottleneck

    @property
    def pool(self) -> Callable[..., resnet.AttentionPool]:  # type: ignore[override]
        return lambda num_positions, *sizes: AttentionPool2d(math.isqrt(num_positions), *sizes)

    def init_parameters(self) -> None:
        openai.initialize_resnet(self)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes all; its norms no longer count either if `freeze_bn_stats`.

        Raises:
            ValueError: groups are to stay unlocked, which open_clip's does not know either.
        """
        if unlocked_groups:
            raise ValueError(f"unlocked_groups is {unlocked_groups}; a ResNet is locked whole, with 0")
        self.requires_grad_(False)
        if freeze_bn_stats:
            freeze_batch_norm_2d(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Does nothing, as open_clip's."""


class TimmModel(_Explained, TimmTower):
    instead = {  # noqa: RUF012
        "forward_intermediates": "`trunk.forward_intermediates` is timm's",
        "set_input_size": "the resolution of a timm tower is not changed",
    }

    def __init__(
        self,
        model_name: str,
        embed_dim: int,
        image_size: int | tuple[int, int] = 224,
        pool: str = "avg",
        proj: str | None = "linear",
        proj_bias: bool = False,
        drop: float = 0.0,
        drop_path: float | None = None,
        patch_drop: float | None = None,
        pretrained: bool = False,
    ) -> None:
        _refuse_other_parts("TimmModel", pretrained=pretrained)
        settings = {"timm_model_name": model_name, "timm_pool": pool, "timm_proj": proj, "timm_proj_bias": proj_bias}
        model = {"embed_dim": embed_dim, "vision_cfg": {**settings, "image_size": image_size}}
        config = config_from_openclip({"model_cfg": model}, "TimmModel").vision
        rates = {"drop_path_rate": drop_path, "patch_drop_rate": patch_drop}
        super().__init__(config, embed_dim, {name: rate for name, rate in rates.items() if rate is not None})
        self.image_size = (config.image_size, config.image_size)
        if config.timm_projection == "linear":
            layers = OrderedDict[str, nn.Module](drop=nn.Dropout(drop))
            layers.update(self.head.named_children())
            self.head = nn.Sequential(layers)
        elif config.timm_projection == "mlp":
            self.head.mlp.drop1.p = drop  # type: ignore[union-attr]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes the trunk and not the head; its last layers learn if `unlocked_groups`, by timm's `group_matcher`."""
        from timm.models import group_modules, group_parameters  # half a second, which only this tower needs

        if not unlocked_groups:
            self.trunk.requires_grad_(False)
            frozen: Collection[str] = ()
        else:
            matcher = self.trunk.group_matcher()
            layers = group_parameters(self.trunk, matcher)
            last = max(layers) - unlocked_groups
            for name in [name for layer, names in layers.items() if layer <= last for name in names]:
                self.trunk.get_parameter(name).requires_grad_(False)
            frozen = {name for name, layer in group_modules(self.trunk, matcher, reverse=True).items() if layer <= last}
        if freeze_bn_stats:
            freeze_batch_norm_2d(self.trunk, frozen)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """By timm; a warning says so where a model of timm's can't."""
        try:
            self.trunk.set_grad_checkpointing(enable)
        except Exception as error:  # whatever timm's model raises
            warnings.warn(f"this trunk of timm's does not recompute its blocks: {error}", stacklevel=2)


class CLIP(_Explained, openai.CLIP):
    """open_clip's model: the text tower's parts stand at its top, beside `visual`.

    Called with images (B, 3, R, R), token ids (B, N) or both, it gives unit features (B, E) of each, None for what is
    not there, the exponentiated scale, and the bias of the logits if there is one; with `output_dict` by their names.
    """

    visual: Any
    transformer: Any
    attn_mask: Tensor | None  # None if a program has every token attend to all
    text_pool_type = "argmax"
    instead = {  # noqa: RUF012
        "forward_intermediates": _HOOKS.format("`visual.transformer.resblocks[i]` or `transformer.resblocks[i]`"),
        "text_eos_id": "a text is read at its largest id",
    }

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: Any,
        text_cfg: Any,
        quick_gelu: bool = False,
        init_logit_scale: float = CLIP_LOGIT_SCALE,
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        cast_dtype: torch.dtype | None = None,
        output_dict: bool = False,
    ) -> None:
        """Random weights.

        Args:
            vision_cfg: a dictionary as `get_model_config` has it, or a dataclass of the same fields.
            text_cfg: alike.
            cast_dtype: without effect; norms are computed in float32 at least.

        Raises:
            ValueError: a setting that these towers have not, with its name.
        """
        vision, text = (asdict(each) if is_dataclass(each) else dict(each) for each in (vision_cfg, text_cfg))  # type: ignore[arg-type]
        model: dict[str, Any]
        model = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
        model |= {"init_logit_scale": float(init_logit_scale), "nonscalar_logit_scale": nonscalar_logit_scale}
        model |= {} if init_logit_bias is None else {"init_logit_bias": init_logit_bias}
        config = config_from_openclip({"model_cfg": model}, "CLIP")
        refuse_foreign(config, "CLIP")
        self._make(config, output_dict, vision)

    @classmethod
    def of(
        cls, config: CLIPConfig, output_dict: bool = False, vision_cfg: Mapping[str, Any] = MappingProxyType({})
    ) -> CLIP:
        """
        Args:
            vision_cfg: open_clip's settings, for those that a CLIPConfig has not: what training leaves out at random,
                and whether the tower gives patches, too.
        """
        if cls.__init__ is not _OWN_INIT:  # a program's own, which is called as open_clip calls it
            settings = openclip_settings(config)["model_cfg"]
            settings["vision_cfg"] |= vision_cfg
            settings["vision_cfg"]["image_size"] = config.vision.image_size
            if config.init_logit_scale == CLIP_LOGIT_SCALE:  # one that open_clip leaves to the class
                del settings["init_logit_scale"]
            settings |= {"output_dict": True} if output_dict else {}
            model = cls(**settings, cast_dtype=None)
            model._tell(config)
            return model
        model = cls.__new__(cls)
        model._make(config, output_dict, vision_cfg)
        return model

    def _make(self, config: CLIPConfig, output_dict: bool, vision_cfg: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)  # what follows draws in open_clip's order, so that a seed gives its weights
        text, D = config.text, config.text.width
        self.context_length, self.vocab_size, self.output_dict = text.context_length, text.vocab_size, output_dict
        self.visual = _image_tower(config, vision_cfg)
        self._tell(config)
        token_embedding = nn.Embedding(text.vocab_size, D)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, D))
        self.transformer = Transformer(
            width=D,
            layers=text.layers,
            heads=text.heads,
            mlp_ratio=text.mlp_ratio,
            act_layer=_layer_called(config.activation),
            norm_layer=LayerNorm,
        )
        self.token_embedding = token_embedding
        self.ln_final = LayerNorm(D)
        self.text_projection = nn.Parameter(torch.empty(D, config.embed_dim))
        self.register_buffer("attn_mask", self.build_attention_mask(), persistent=False)
        bias = config.init_logit_bias
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.initialize_parameters()

    def initialize_image_tower(self) -> None:
        """Does nothing: here a tower draws its parameters when it is made."""

    def _tell(self, config: CLIPConfig) -> None:
        """Gives itself and its image tower the attributes that tell how it is made and used."""
        self.config = config
        self.visual.output_dim = config.embed_dim
        self.visual.preprocess_cfg = _preprocess_cfg(config.vision)
        self.visual.image_mean, self.visual.image_std = config.vision.mean, config.vision.std

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.get_cast_dtype()

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes the image tower but for its last groups, as for locked-image tuning (Zhai et al. 2021)."""
        self.visual.lock(unlocked_groups, freeze_bn_stats)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the text tower but for its last groups: embeddings; a group for each block, the last with ln_final;
        text_projection.

        Raises:
            ValueError: norms are to stay unlocked, which open_clip's does not know either.
        """
        if not freeze_layer_norm:
            raise ValueError(f"freeze_layer_norm is {freeze_layer_norm}; norms are locked with their blocks, with True")
        *blocks, last = self.transformer.resblocks
        embeddings = [self.token_embedding, self.positional_embedding]
        projection = [] if self.text_projection is None else [[self.text_projection]]
        _unlock_last([embeddings, *([block] for block in blocks), [last, self.ln_final], *projection], unlocked_layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks are computed again for the gradient, which saves memory."""
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with several dimensions that optimizers are not to decay."""
        of_tower = self.visual.no_weight_decay() if hasattr(self.visual, "no_weight_decay") else set()
        return {"positional_embedding", *(f"visual.{name}" for name in of_tower)}

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(image.to(_input_dtype(self.visual, image.dtype)))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, N) -> (B, E), read at each row's largest id, which is the end of text, or by another `text_pool_type`."""
        N, dtype = text.shape[1], self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:N].to(dtype)  # (B, N, D)
        x = self.ln_final(self.transformer(x, attn_mask=None if self.attn_mask is None else self.attn_mask[:N, :N]))
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=getattr(self, "text_eos_id", None))
        features = project(x, self.text_projection)
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines (B, M) plus any bias, and their transpose, as calling ours and OpenAI's models gives."""
        image_features, text_features = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Any:
        outputs = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias
        return outputs if self.output_dict else tuple(outputs.values())


_OWN_INIT = CLIP.__init__


def _input_dtype(tower: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What an image tower computes its first convolution in."""
    weights = (each for each in tower.parameters() if each.ndim == 4 and each.is_floating_point())
    return next((each.dtype for each in weights), otherwise)


def _image_tower(config: CLIPConfig, vision_cfg: Mapping[str, Any]) -> nn.Module:
    vision, R = config.vision, config.vision.image_size
    patch_dropout = vision_cfg.get("patch_dropout") or 0.0
    if vision.kind == "vit":
        return VisionTransformer(
            image_size=R,
            patch_size=vision.patch_size,
            width=vision.width,
            layers=vision.layers,
            heads=vision.heads,
            mlp_ratio=vision.mlp_ratio,
            output_dim=config.embed_dim,
            patch_dropout=patch_dropout,
            act_layer=_layer_called(config.activation),
            norm_layer=LayerNorm,
            output_tokens=bool(vision_cfg.get("output_tokens")),
        )
    if vision.kind == "timm":
        projection = None if vision.timm_projection == "classifier" else vision.timm_projection
        return TimmModel(
            vision.timm_model,
            embed_dim=config.embed_dim,
            image_size=R,
            pool=vision.timm_pool,
            proj=projection,
            proj_bias=vision.timm_projection_bias,
            drop=vision_cfg.get("timm_drop") or 0.0,
            drop_path=vision_cfg.get("timm_drop_path"),
            patch_drop=patch_dropout or None,
        )
    return ModifiedResNet(
        layers=vision.blocks, output_dim=config.embed_dim, heads=vision.heads, image_size=R, width=vision.width
    )


def _preprocess_cfg(vision: VisionConfig) -> dict[str, Any]:
    size = vision.image_size if vision.kind == "resnet" else (vision.image_size, vision.image_size)
    return {
        "size": size,
        "mode": "RGB",
        "mean": vision.mean,
        "std": vision.std,
        "interpolation": vision.interpolation,
        "resize_mode": vision.resize,
        "fill_color": 0,
    }
