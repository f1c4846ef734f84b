"""COCO's published captions: which picture has which first caption."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError

_WANTED = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "caption")}


def first_captions(path: str | Path) -> tuple[list[str], list[str]]:
    """([n] file names, [n] captions) of a ``captions_*.json``, by ascending image id.

    An image's first caption is the one of lowest annotation id.

    Raises:
        InputError: the file is not JSON, has other columns, or an image has no caption.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"evaluate: prompts must be COCO's captions JSON, got {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"evaluate: prompts must be COCO's captions JSON, got {path}: {error}") from error
    for table, columns in _WANTED.items():
        rows = data.get(table) if isinstance(data, dict) else None
        found = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
        if not all(column in found for column in columns):
            got = ", ".join(found) or ("none" if isinstance(data, dict) else f"a {type(data).__name__}")
            raise InputError(
                f"evaluate: prompts must be COCO's captions JSON, whose {table} have {', '.join(columns)}; "
                f"{path} has {got}"
            )
    captions: dict[int, tuple[int, str]] = {}
    names: dict[int, str] = {}
    try:
        for row in data["annotations"]:
            number, image, caption = row["id"], row["image_id"], row["caption"].strip()
            if image not in captions or number < captions[image][0]:
                captions[image] = (number, caption)
        names = {row["id"]: row["file_name"] for row in data["images"]}
        images = sorted(names)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"evaluate: every row of {path} must have the columns of the first, got {error!r}") from error
    bare = [image for image in images if not captions.get(image, (0, ""))[1]]
    if bare:
        raise InputError(f"evaluate: every image of {path} must have a caption, got none for image {bare[0]}")
    strange = [name for name in names.values() if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise InputError(f"evaluate: file_name in {path} must be a plain name, got {strange[0]!r}")
    return [names[image] for image in images], [captions[image][1] for image in images]
