"""croissant.json: what a bundle holds, in the vocabulary dataset search engines read (Croissant 1.0, MLCommons 2024).

Written by hand, since the mlcroissant package brings 343 MiB and its formats cannot describe Zarr arrays: the two files
named here list, and hash, all others.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .collection import Collection

_CROISSANT_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _CROISSANT_TERMS},
}
_FORMATS = {"json": "application/json", "txt": "text/plain"}


def croissant_document(
    collection: Collection, authors: Sequence[str], published: str, files: Mapping[str, tuple[int, str]]
) -> dict[str, Any]:
    """Describe a bundle of `collection` as a Croissant dataset.

    `published` is a date, YYYY-MM-DD; `files` maps the files that list all others to bytes and sha256.
    """
    title = f"{collection.name} {collection.version}"
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": collection.name,
        "version": collection.version,
        "description": describe(collection),
        "license": licence_url(collection.licence),
        "creator": [{"@type": "sc:Person", "name": author} for author in authors],
        "datePublished": published,
        "citeAs": f"{', '.join(authors)} ({published[:4]}). {title}. Content hash {collection.content_hash}.",
        "isLiveDataset": False,
        "keywords": ["offline meta-reinforcement learning", "reinforcement learning", "zarr", collection.family],
        "distribution": [_file_object(name, *facts) for name, facts in sorted(files.items())],
    }


def describe(collection: Collection) -> str:
    """One sentence about a collection."""
    steps = sum(entry.counts["mixed"].steps for entry in collection.tasks)
    return (
        f"Offline meta-reinforcement learning data of the task family {collection.family}: "
        f"{len(collection.tasks)} tasks ({len(collection.train_tasks())} to train on, {len(collection.test_tasks())} "
        f"to test on), {steps} transitions."
    )


def licence_url(licence: str) -> str:
    """The SPDX page of a licence; an expression or a licence of one's own has none and stays as it is."""
    if re.fullmatch(r"(?!LicenseRef-)[A-Za-z0-9.+-]+", licence):
        return f"https://spdx.org/licenses/{licence}.html"
    return licence


def _file_object(name: str, size: int, sha256: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": _FORMATS[name.rpartition(".")[2]],
        "sha256": sha256,
    }
