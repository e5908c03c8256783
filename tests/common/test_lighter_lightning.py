# What a training run imports: torchmetrics half open, and all of it for whoever asks. Processes of their own, as an
# import happens once.

import subprocess
import sys

import pytest

HALF_OPEN = """
import sys, miniclip.commands.train, torchmetrics
from pytorch_lightning.core.module import Metric, MetricCollection
heavy = {"transformers", "torchvision", "scipy", "torchmetrics.functional"} & set(sys.modules)
print(not heavy, torchmetrics.__version__ > "1", not hasattr(torchmetrics, "__no_such_thing__"))
from torchmetrics import Accuracy
print("torchmetrics.functional" in sys.modules, issubclass(Accuracy, Metric), torchmetrics.Metric is Metric)
from torchmetrics.classification import MulticlassAccuracy
print(issubclass(MulticlassAccuracy, Metric), issubclass(torchmetrics.text.BLEUScore, Metric))
print(torchmetrics.MetricCollection is MetricCollection, not hasattr(torchmetrics, "NoSuchMetric"))
"""

THREADS = """
import threading, miniclip.commands.train, torchmetrics
found = []
threads = [threading.Thread(target=lambda: found.append(torchmetrics.Accuracy)) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(len(found) == 4)
"""

STAR = """
import miniclip.commands.train
from torchmetrics import *
print(Accuracy.__name__ == "Accuracy")
"""

OTHER_VERSION = """
import sys
class Once:
    def find_spec(self, name, path=None, target=None):
        if name == "torchmetrics.collections" and self in sys.meta_path:
            sys.meta_path.remove(self)
            raise ImportError(name)
sys.meta_path.insert(0, Once())
from miniclip.common import lighter_lightning
import torchmetrics, pytorch_lightning
print("torchmetrics.functional" in sys.modules)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "script",
    [HALF_OPEN, *(pytest.param(each, marks=pytest.mark.long) for each in (THREADS, STAR, OTHER_VERSION))],
    ids=["half open", "threads", "star", "another version"],
)
def test_training_imports_two_classes_of_torchmetrics_and_leaves_all_else_to_whoever_asks(script):
    """A version that cannot be imported in part is imported as a whole."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"True"}
