"""Sphinx's configuration of the site: `make docs` builds it, with warnings as errors and without the network."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from functools import partialmethod
from pathlib import Path

from nbclient import NotebookClient
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import reference_pages  # noqa: E402

from miniclip.common.version import __version__  # noqa: E402

project = "miniclip"
release = __version__
project_copyright = "the developers of miniclip"
extensions = ["myst_nb", "accessible", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "miniclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # of a cell; the longest trains for half a minute of one idle core
# The folders that notebooks leave to the system go with the build.
os.environ["TMPDIR"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)
# A page's Python has ten minutes to start; the minute that myst-nb gives is too short on a busy machine.
NotebookClient.__init__ = partialmethod(NotebookClient.__init__, startup_timeout=600)
nb_execution_excludepatterns = ["notebooks/openai_weights.ipynb"]  # its download needs a network
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
default_role = "code"
napoleon_use_rtype = False


def with_downloads(app: Sphinx, name: str, source: list[str]) -> None:
    """Links that lead out of docs/ become downloads, or words where they lead to a folder."""
    folder = (DOCS / name).parent

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        target = target.split("#")[0]
        path = (folder / target).resolve()
        if path.is_relative_to(DOCS):
            return link[0]
        return f"{{download}}`{text} <{target}>`" if path.is_file() else text

    source[0] = re.sub(r"\[([^\]]*)\]\((\.\./[^)]*)\)", replaced, source[0])


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: reference_pages.write(DOCS / "reference"))
    app.connect("source-read", with_downloads)
