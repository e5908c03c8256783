"""A map on its picture: colours where it matters, stripes where nothing is seen."""

import numpy as np
import pytest
from helpers import picture
from PIL import Image

from miniclip.reports.heat import overlay


def test_what_speaks_for_the_text_is_warm_and_what_speaks_against_it_cold():
    relevance = np.zeros((20, 30))
    relevance[:10, :10], relevance[10:, 20:] = 2.0, -1.0
    shown = np.asarray(overlay(Image.new("RGB", (30, 20), (90, 160, 90)), relevance), dtype=int)
    factor = 448 // 30
    assert shown.shape == (20 * factor, 30 * factor, 3)
    warm, cold, plain = (shown[y * factor, x * factor] for x, y in ((3, 3), (27, 17), (15, 10)))
    assert warm[0] > warm[2] + 100
    assert cold[2] > cold[0] + 40
    assert np.ptp(plain) == 0  # the picture is grey


def test_what_the_model_does_not_see_is_striped():
    relevance = np.full((500, 600), np.nan)
    relevance[:, 50:550] = 1.0
    shown = np.asarray(overlay(Image.new("RGB", (600, 500), "white"), relevance), dtype=int)
    assert shown.shape == (500, 600, 3)  # a large picture keeps its size
    assert len(np.unique(shown[100, :50].sum(axis=1))) == 2
    assert len(np.unique(shown[100, 60:540].sum(axis=1))) == 1
    assert (shown[:, :50, 0] == shown[:, :50, 2]).all()


@pytest.mark.parametrize("fill", [0.0, np.nan], ids=["no relevance", "nothing seen"])
def test_a_map_of_nothing_has_no_colour(fill):
    shown = np.asarray(overlay(picture(1), np.full((20, 24), fill)), dtype=int)
    assert (np.ptp(shown, axis=2) == 0).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_every_mode_are_drawn_on(mode):
    assert overlay(picture(1, mode=mode), np.ones((20, 24))).mode == "RGB"
