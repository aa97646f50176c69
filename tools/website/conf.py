"""Sphinx's settings for the documentation site. `make docs` builds it by build.py, which assembles the pages first."""

import inspect
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from sphinx.util.inspect import signature, stringify_signature

import keras_kd
from tools.website import docstrings, names

project, author, version, release = "keras_kd", "the authors of keras_kd", keras_kd.__version__, keras_kd.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
root_doc = "index"
language = "en"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

html_theme = "furo"  # light and dark, with system fonts: nothing is fetched from elsewhere
html_title = f"keras_kd {version}"
html_copy_source = html_show_sourcelink = False
html_show_search_summary = False  # which a page opened from a disk may not fetch
html_theme_options = {"navigation_with_keys": True}
html_static_path: list[str] = []

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autosummary_generate = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Call arguments", "params_style"), "Reference"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

# What Keras asks of every layer, loss or callback says nothing of this one.
_OF_KERAS = {"build", "compute_output_shape", "compute_output_spec", "from_config", "get_build_config", "get_config"}
_LINKS, _HOMES = names.links(), names.homes()


def _docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    own = _HOMES.get(id(thing), name)

    def reference(code: str) -> str | None:
        target = names.target(code, _LINKS)
        return None if target == own else target

    lines[:] = docstrings.to_rst(lines, reference)


def _skip(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    return True if name in _OF_KERAS or name.startswith("on_") else None


def _bases(app: Any, name: str, thing: Any, options: Any, bases: list[Any]) -> None:
    """Names bases as users know them."""
    for index, base in enumerate(bases):
        if id(base) in _HOMES:
            bases[index] = f":py:obj:`{_HOMES[id(base)]}`"
        elif inspect.isclass(base):
            root = base.__module__.split(".")[0]
            public = getattr(base, "_api_export_path", None) or (base.__name__ if root == "builtins" else f"{root}.{base.__name__}")
            bases[index] = f"``{public[0] if isinstance(public, list) else public}``"


def _signature(app: Any, what: str, name: str, thing: Any, options: Any, given: str, returned: str) -> tuple[str, str] | None:
    """Shows what `__init__` takes where Keras hides it behind a `__new__` of its own."""
    if what != "class" or given != "(*args, **kwargs)":
        return None
    found = signature(thing.__init__, bound_method=True).replace(return_annotation=inspect.Signature.empty)
    return stringify_signature(found, unqualified_typehints=True), returned


def setup(app: Any) -> dict[str, bool]:
    """Connects what is done to docstrings, before napoleon (500) reads them."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-bases", _bases)
    return {"parallel_read_safe": True}
