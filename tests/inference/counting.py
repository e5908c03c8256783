"""A model that counts the pictures it is given, in a module that a process of its own can import."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


class Counting:
    """Features are a picture's pixels, or a text's letters."""

    logit_scale = 1.0
    fingerprint = "counting"

    def __init__(self):
        self.num_images = 0

    def preprocess(self, image):
        return torch.tensor(np.array(image.convert("RGB").resize((4, 4))), dtype=torch.float32).permute(2, 0, 1) / 255

    def encode_image(self, images):
        self.num_images += len(images)
        return images.flatten(1) - 0.5

    def tokenize(self, texts):
        return torch.tensor([[float(ord(letter)) for letter in f"{text:48.48}"] for text in texts])

    def encode_text(self, tokens):
        return tokens - 80

    def of(self, path):
        """The unit features of a file."""
        features = self.preprocess(Image.open(path)).flatten() - 0.5
        return (features / features.norm()).numpy()
