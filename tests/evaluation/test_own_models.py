"""Models that a user's own code makes: what it raises, and what it returns wrongly, is a sentence that names it."""

import re
import sys

import pytest
import warm
from helpers import write_picture

from miniclip.evaluation.datasets.sets import EvaluationSet
from miniclip.evaluation.encoder import ModelError
from miniclip.evaluation.features import encode_images, encode_texts
from miniclip.evaluation.other_libraries import as_encoder, open_model

OWN = """
import torch
from miniclip.images import Preprocess

class Good:
    logit_scale = 1.0
    preprocess = Preprocess(16, (0, 0, 0), (1, 1, 1))
    calls = 0
    def encode_image(self, images): return images.flatten(1)[:, :4] + 1
    def encode_text(self, tokens): return tokens.float() + torch.ones(len(tokens), 4)
    def tokenize(self, texts): return torch.tensor([[len(text)] for text in texts])

class Divides(Good):
    def encode_image(self, images): return images / (0 // 0)
class Refuses(Good):
    def preprocess(self, image): raise ValueError("not\\nmine")
class Asserts(Good):
    def tokenize(self, texts): assert not texts
class Looks(Good):
    def encode_text(self, tokens): return {}["weights"]
class Arrays(Good):
    def preprocess(self, image): return [0.0] * 12
class Grows(Good):
    def preprocess(self, image):
        self.calls += 1
        return torch.ones(3, self.calls, 4)
class Averages(Good):
    def encode_image(self, images): return torch.ones(1, 4)
    def encode_text(self, tokens): return torch.ones(1, 4)

def lacks_weights(): raise RuntimeError("no weights")
def ends(): raise SystemExit(3)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_that_fails.py").write_text(OWN)
    yield f"python:{tmp_path / 'own_that_fails.py'}"
    sys.modules.pop("own_that_fails", None)


def use(name: str, folder) -> None:
    model = open_model(name, "cpu")
    data = EvaluationSet("photos", tuple(write_picture(folder / f"{number}.png", number) for number in range(3)))
    encode_images(model.encode_image, model.preprocess, data, num_workers=2, batch_size=2)
    encode_texts(model, ["a", "bb"], model.tokenize)


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("Divides", "encode_image of NAME raised ZeroDivisionError: .* by zero (LINE)"),
        ("Refuses", "preprocess of NAME raised ValueError: not mine (LINE)"),
        ("Asserts", "tokenize of NAME raised AssertionError (LINE)"),
        ("Looks", "encode_text of NAME raised KeyError: 'weights' (LINE)"),
        ("Arrays", "preprocess of NAME gives a list; a tensor (3, R, R) is needed"),
        ("lacks_weights", "lacks_weights of NAME raised RuntimeError: no weights (LINE)"),
        ("ends", "ends of NAME raised SystemExit: 3 (LINE)"),
    ],
)
def test_what_a_users_code_raises_names_the_model_the_error_and_the_line(own, tmp_path, which, says):
    with pytest.raises(ModelError) as caught:
        use(f"{own}:{which}", tmp_path)
    pattern = re.escape(says).replace("NAME", re.escape(f"{own}:{which}")).replace("LINE", r".*own_that_fails\.py:\d+")
    assert re.fullmatch(pattern.replace(r"\.\*", ".*"), str(caught.value))


def test_the_good_one_passes(own, tmp_path):
    use(f"{own}:Good", tmp_path)


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("Grows", r"gives the shapes \(3, 1, 4\) and \(3, 2, 4\)"),
        ("Averages", "gives 1 vectors of features for 2 images"),
    ],
)
def test_features_and_pixels_that_are_not_one_for_each_are_refused(own, tmp_path, which, says):
    with pytest.raises(ValueError, match=says):
        use(f"{own}:{which}", tmp_path)
    model = open_model(f"{own}:Averages", "cpu")
    with pytest.raises(ValueError, match="gives 1 vectors of features for 2 texts"):
        encode_texts(model, ["a", "bb"], model.tokenize)


def test_an_object_in_python_keeps_its_own_error_as_the_cause(own):
    open_model(f"{own}:Good", "cpu")
    given = as_encoder(sys.modules["own_that_fails"].Looks())
    with pytest.raises(ModelError, match="encode_text of the given model raised KeyError") as caught:
        encode_texts(given, ["a"], given.tokenize)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_traceback_comes_along_from_a_process_that_decodes(own, tmp_path):
    with pytest.raises(ModelError) as caught:
        use(f"{own}:Refuses", tmp_path)
    assert 'def preprocess(self, image): raise ValueError("not\\nmine")' in caught.value.__notes__[0]


def test_a_command_ends_in_one_sentence(own, tmp_path):
    photo = str(write_picture(tmp_path / "photo.png", 0))
    command = [sys.executable, "-m", "miniclip", "classify", photo, "--model", f"{own}:Divides", "--labels", "a,b"]
    done = warm.run(command)
    assert done.returncode == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert f"encode_image of {own}:Divides raised ZeroDivisionError" in error
    assert "Traceback" not in done.stderr
