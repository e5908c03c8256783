"""Findings -> sentences: what would spoil training without anyone noticing, and what to do about it."""

from __future__ import annotations

import math
import os

from ..common.wording import cut_short, portion, share_of
from .findings import Findings

_NOTABLE = 0.01  # a share from which something is worth a sentence
_NOTABLE_LOSS = 0.1  # of chance
_TEMPLATE = 0.5  # share of the captions that makes one wording a template


def what_spoils(findings: Findings, are_captions_shared: bool = False) -> list[str]:
    """What would make a model worse without anyone noticing.

    Args:
        are_captions_shared: this training was set to what fits (`model.positives`), so equal captions are known of.
    """
    sampled, batch, size = findings.num_sampled, findings.batch_size, findings.image_size
    num_bad, chance = sampled - findings.num_usable, math.log(batch)
    cut, small = share_of(findings.token_counts > findings.context_length), share_of(findings.short_sides < size / 2)
    out = [
        f"{num_bad:,} of {sampled:,} samples ({portion(num_bad / sampled)}) can't be used; "
        f"{problem.num_samples:,} like this one: {cut_short(problem.examples[0])}: {cut_short(problem.reason, 300)}"
        for problem in findings.problems[:1]
    ]
    wordless, M = findings.wordless, len(findings.token_counts)
    if wordless and len(wordless) / M >= _NOTABLE:
        source, text = wordless[0]
        out.append(
            f"{len(wordless):,} of {M:,} captions ({portion(len(wordless) / M)}) have no word, as "
            f"{cut_short(text, 80)!r} of {cut_short(source)}: are they numbers of classes or rows? Training would take "
            "them for texts. Name the column of the captions, or write what the images show"
        )
    if cut >= _NOTABLE:
        out.append(
            f"{portion(cut)} of the captions are longer than {findings.context_length} tokens: their ends are cut off "
            "and never read. Put what matters first, shorten them, or raise the context length"
        )
    if findings.lowest_loss >= _NOTABLE_LOSS * chance and not are_captions_shared:
        repeated = portion(findings.num_repeated / M)
        out.append(
            f"{repeated} of the captions occur with more than one image: in a batch of {batch:,} a pair meets "
            f"{findings.false_negatives * (batch - 1):.2g} others with its own caption, which no model can tell from "
            f"it, so the loss can't fall below {findings.lowest_loss:.2f} (chance is {chance:.2f}). Use captions that "
            "say more; for model.loss=siglip, which pushes such pairs apart, also set model.positives=caption"
        )
    if findings.template_share >= _TEMPLATE and findings.template_texts > 1:
        out.append(
            f"{portion(findings.template_share)} of the captions are {cut_short(findings.template, 80)!r} but for "
            f"digits and punctuation ({findings.template_texts:,} texts): little distinguishes them. Describe what "
            "the images show"
        )
    if small >= _NOTABLE:
        out.append(
            f"{portion(small)} of the images have a short side under {size / 2:g} pixels, less than half of the "
            f"{size} that the model sees: they are enlarged. Use larger ones, or a smaller image size"
        )
    return out


def advice(findings: Findings) -> list[str]:
    """Sentences about what to do; the graver ones first."""
    out = what_spoils(findings) or ["Nothing was found that would spoil training"]
    if not findings.num_usable:
        return out
    copied, turned = findings.num_copies / findings.num_usable, findings.num_rotated / findings.num_usable
    if findings.batch_size > findings.num_pairs:
        out.append(
            f"A batch of {findings.batch_size:,} is more than the {findings.num_pairs:,} pairs; use a smaller one"
        )
    if findings.num_blank:
        out.append(f"Blank captions: {findings.num_blank:,}; `miniclip shards` leaves such lines out")
    if copied >= _NOTABLE:
        out.append(
            f"{portion(copied)} of the images have a copy in the sample; the share in all the data is at least that. "
            "Put the captions of an image together, as lines of one .txt or as rows with one path"
        )
    if turned >= _NOTABLE:
        out.append(
            f"{portion(turned)} of the images are turned by an EXIF tag, which training does not follow: the model "
            "sees them as they are stored. `miniclip shards --upright` packs them as viewers show them; what is then "
            "trained wants --upright in eval, classify, embed and the others, too"
        )
    rate = f"{findings.decode_images_per_s:,.0f}"
    if not findings.workers:
        return [
            *out,
            f"Each worker feeds about {rate} images/s; with --needed N the number of workers for N images/s is shown",
        ]
    cores = os.cpu_count() or 1
    too_many = f". This machine has {cores} cores; smaller images (miniclip shards --resize) decode faster"
    out.append(
        f"Workers for {findings.needed:g} images/s: {findings.workers:,}, as each feeds about {rate}"
        + (too_many if findings.workers > cores else "")
    )
    if findings.needed and findings.needed * findings.mean_bytes > findings.read_bytes_per_s:
        read = findings.read_bytes_per_s / findings.mean_bytes
        out.append(f"Reading gives {read:,.0f} images/s, fewer than are needed")
    return out
