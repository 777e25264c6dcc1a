"""The site: `sphinx-build -W docs docs/_build`. Pages are Markdown (MyST), the API comes from the docstrings."""

import numba_attn

project = "numba-attn"
author = "The numba-attn developers"
version = release = numba_attn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "numba-attn"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give types, shapes and dtypes in words
napoleon_google_docstring = False
# Types are words ("(B,) ints"), not names of classes: as fields of their own, each word would be a link to nothing.
napoleon_use_param = False
napoleon_use_rtype = False
nitpicky = True
