"""Render pages from jinja2 templates, with pictures inside the page."""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image


def render_page(template: Path, *, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """Return the text of a template, in which every name must have a value; values are escaped for *.html.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    text = environment.get_template(template.name).render(values)
    # Text of a sample may contain half a surrogate pair, which cannot be encoded.
    return text.encode("utf-8", "replace").decode("utf-8")


def picture_url(picture: Image.Image, *, size_px: int) -> str:
    """Return a picture as a data URL with a JPEG of at most this width and height; `picture` itself shrinks."""
    picture.thumbnail((size_px, size_px))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
