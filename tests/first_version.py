"""What the first version of the program left: a text, its token store, a run that ended and one that was killed.

`data/first_version.tar.xz` holds, as the code of commit d20645f made them (November 2026):

    documents.jsonl   60 documents
    store/            python -m gqa_jax.data.prepare --out store --tokenizer bytes documents.jsonl
    config.py         the configuration
    run/              python -m gqa_jax.train --config=config.py --workdir=run, beside store/; its last checkpoint only
    begun/            the same as it was after ten of its 20 steps

They must open for ever: held out by position, the first windows, a warm-up from zero. `tests/goldens` has a finished quickstart
of that version, without checkpoints, and `data/quickstart_first_version.py` the grid that it is of.
"""

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parent / "data" / "first_version.tar.xz"
QUICKSTART = str(Path(__file__).parent / "data" / "quickstart_first_version.py")
FINGERPRINT = "ad99c916eb1b853e4880c05f7bdac01f8413a00db2252584f9a371eea2c9839c"  # of store/
IDENTITY = "203749a914"  # of run/ and begun/
LOSS = 4.1405387171544135  # of run/, nats per token
PARAMS_SHA256 = "0e7902139baa79cf9b0cbb5837e91b33aea2a4064cb34e2df95a042b6508746f"  # of run/, on one kind of processor


def unpack(folder: Path) -> Path:
    """Puts all of it into `folder`, which is returned."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder
