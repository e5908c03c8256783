"""open_clip's losses, as modules with its arguments: of one process, or of several that each have a part of the pairs.

`loss` has the functions that miniclip trains with. b pairs of this process, B of all, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.processes import gather, rank_and_world_size
from .loss import clip_loss
from .openclip_names import missing


def gather_features(
    image_features: Tensor,
    text_features: Tensor,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    rank: int = 0,
    world_size: int = 1,
    use_horovod: bool = False,
) -> tuple[Tensor, Tensor]:
    """(b, E) of each process -> (B, E), twice.

    Args:
        local_loss: without `gather_with_grad`, no row has a gradient; otherwise this process's rows have theirs.
        gather_with_grad: a row's gradient is the sum over the processes.

    Raises:
        ValueError: other processes than torch.distributed's are asked for, or horovod.
    """
    if use_horovod:
        raise ValueError("use_horovod is True; processes are torch.distributed's here")
    if (rank, world_size) != rank_and_world_size():
        found, count = rank_and_world_size()
        raise ValueError(f"rank is {rank} of {world_size} (world_size); torch.distributed has rank {found} of {count}")
    if gather_with_grad:
        return gather(image_features), gather(text_features)
    images, texts = gather(image_features.detach()), gather(text_features.detach())
    if not local_loss:
        first = rank * len(image_features)
        images = torch.cat([images[:first], image_features, images[first + len(image_features) :]])
        texts = torch.cat([texts[:first], text_features, texts[first + len(text_features) :]])
    return images, texts


class ClipLoss(nn.Module):
    """Computed through `get_logits` and `get_ground_truth` where a program has its own, or over processes, in memory
    for all logits; else by `clip_loss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        """
        Args:
            local_loss: of this process's rows, among all pairs; otherwise of all rows.
            gather_with_grad: other processes' features have a gradient, too. With it, the average of gradients that
                DDP takes is that of one process with all pairs; without it, a part of the gradient is missing.
        """
        super().__init__()
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Of images and of texts: (B, B) each, or with `local_loss` over several processes (b, B)."""
        images, texts = image_features, text_features
        if self.world_size > 1:
            options = (self.local_loss, self.gather_with_grad, self.rank, self.world_size, self.use_horovod)
            images, texts = gather_features(images, texts, *options)
        if self.world_size > 1 and self.local_loss:
            per_image, per_text = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            per_text = per_image.T
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Any = None,
        output_dict: bool = False,
    ) -> Any:
        methods = [getattr(method, "__func__", None) for method in (self.get_logits, self.get_ground_truth)]
        if methods == _OWN_METHODS and self.world_size == 1:
            loss = clip_loss(image_features, text_features, logit_scale)  # a bias moves all logits and no softmax
        else:
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            loss = self._cross_entropy(*logits)
        return {"contrastive_loss": loss} if output_dict else loss

    def _cross_entropy(self, per_image: Tensor, per_text: Tensor) -> Tensor:
        labels = self.get_ground_truth(per_image.device, len(per_image))
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


_OWN_METHODS = [ClipLoss.get_logits, ClipLoss.get_ground_truth]


class DistillClipLoss(ClipLoss):
    """CLIP's loss, and beside it the cross-entropy of a teacher's probabilities and the student's."""

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return -(teacher_logits.softmax(dim=1) * student_logits.log_softmax(dim=1)).sum(dim=1).mean()

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Any:
        students = self.get_logits(image_features, text_features, logit_scale)
        teachers = self.get_logits(dist_image_features, dist_text_features, dist_logit_scale)
        contrastive = self._cross_entropy(*students)
        distilled = (self.dist_loss(teachers[0], students[0]) + self.dist_loss(teachers[1], students[1])) / 2
        return {"contrastive_loss": contrastive, "distill_loss": distilled} if output_dict else (contrastive, distilled)


class SigLipLoss(nn.Module):
    """The sigmoid loss (Zhai et al. 2023), of this process's images with all texts."""

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        """
        Args:
            dist_impl: any of open_clip's ways to exchange texts, which give the same numbers; here they are gathered.
        """
        super().__init__()
        self.cache_labels, self.rank, self.world_size, self.dist_impl = cache_labels, rank, world_size, dist_impl

    def get_ground_truth(
        self, device: torch.device | str, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(b, b), 1 for a pair and -1 for all else."""
        return (0 if negative_only else 2) * torch.eye(num_logits, device=device, dtype=dtype) - 1

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Any = None
    ) -> Tensor:
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Any = None, negative_only: bool = False
    ) -> Tensor:
        logits = self.get_logits(images, texts, logit_scale, logit_bias)
        labels = self.get_ground_truth(images.device, images.dtype, len(images), negative_only)
        return -F.logsigmoid(labels * logits).sum() / len(images)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Any,
        output_dict: bool = False,
    ) -> Any:
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        if self.world_size > 1:
            _, texts = gather_features(image_features, text_features, True, True, self.rank, self.world_size)
            for rank, others in enumerate(texts.chunk(self.world_size)):
                if rank != self.rank:
                    loss = loss + self._loss(image_features, others, logit_scale, logit_bias, negative_only=True)
        return {"contrastive_loss": loss} if output_dict else loss


def create_loss(args: Any) -> nn.Module:
    """The loss that open_clip's training takes by its arguments.

    Raises:
        ValueError: they ask for CoCa's.
    """
    if not getattr(args, "distill", False) and "coca" in args.model.lower():
        raise ValueError(f"args.model is {args.model!r}; {missing('CoCaLoss')}")
    if not getattr(args, "distill", False) and getattr(args, "siglip", False):
        return SigLipLoss(rank=args.rank, world_size=args.world_size)
    kind = DistillClipLoss if getattr(args, "distill", False) else ClipLoss
    return kind(args.local_loss, args.gather_with_grad, True, args.rank, args.world_size, args.horovod)
