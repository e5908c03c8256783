"""Imported before Lightning, whose import then takes a second instead of five where transformers is installed.

Lightning needs two classes of torchmetrics. `import torchmetrics` brings every metric there is, and with them
transformers, torchvision and scipy, wherever these are installed. Here the package is left half open: with the two
classes, and all of it as soon as anybody asks for any other name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
import threading
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_PACKAGE = "torchmetrics"


def _half_open() -> ModuleType:
    """The package with Metric and MetricCollection, and what their own modules take from it."""
    spec = find_spec(_PACKAGE)
    assert spec is not None
    assert spec.loader is not None
    loader, package = spec.loader, module_from_spec(spec)
    lock, is_opening = threading.RLock(), False  # other threads wait; this one may ask again while it imports

    def all_of_it(name: str) -> Any:
        nonlocal is_opening
        known, opens = vars(package), name == "__all__" or not name.startswith("__")
        with lock:
            if opens and not is_opening and known.get("__getattr__") is all_of_it:
                is_opening = True
                try:
                    loader.exec_module(package)
                    del known["__getattr__"]
                finally:
                    is_opening = False
        if name not in known:
            raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
        return known[name]

    facts = {"__version__": importlib.metadata.version(_PACKAGE), "_logger": logging.getLogger(_PACKAGE)}
    vars(package).update(facts, __getattr__=all_of_it)
    sys.modules[_PACKAGE] = package
    importlib.import_module(f"{_PACKAGE}.utilities")  # in this order, as the modules import each other
    for module, name in (("metric", "Metric"), ("collections", "MetricCollection")):
        setattr(package, name, getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name))
    return package


if _PACKAGE not in sys.modules:
    try:
        _half_open()
    except Exception:  # another version of it, with other modules; Lightning imports it whole
        for _name in [each for each in sys.modules if each.split(".")[0] == _PACKAGE]:
            del sys.modules[_name]
