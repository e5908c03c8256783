"""The version, as the installed package's metadata has it."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("miniclip")
except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"
