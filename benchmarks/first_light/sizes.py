"""Shapes of first light: on a device, and tiny ones for a rehearsal on a CPU. Imports no jax."""

from __future__ import annotations

from typing import Any, NamedTuple

#: Of calls, beside plain ones: keys before the queries, queries that see nothing, documents, logits x 30.
KINDS = ("offset", "unseen", "segments, sorted", "segments of one token", "segments, unsorted", "large logits")


class Sizes(NamedTuple):
    """Shapes of one mode. Heads are (query, key/value)."""

    matmul: int
    copy_bytes: int
    look: tuple[int, ...]  # lengths of the first look at attention
    rest: tuple[tuple[int, tuple[int, int], int], ...]  # (length, heads, head size) of the rest
    documents: tuple[int, tuple[int, ...]]  # a length, and numbers of documents in it
    scan: int  # length of the attention in a scan of checkpoints
    races: tuple[int, ...]
    race_heads: tuple[tuple[int, int], ...]
    runs: int
    correct_lengths: tuple[int, ...]
    correct_heads: tuple[tuple[int, int], ...]
    correct_dims: tuple[int, ...]
    correct_kinds: tuple[str, ...]  # beside plain calls
    decode: tuple[tuple[int, int], ...]  # (batch, length of the cache)
    decode_heads: tuple[tuple[int, int], ...]
    training: dict[str, dict[str, Any]]  # model and shapes of a step, by name
    main: str  # the training that is compared
    small: str  # the smallest, several at a time
    repeats: int
    processes: tuple[int, ...]
    steps: int  # of a sample of training
    agreement: int  # steps after which losses are compared
    variants: tuple[tuple[str, str, str], ...]  # (model, rematerialisation, attention) of the other trainings


def _paper(layers: int, width: int, context: int = 8192, micro_batch: int = 2) -> dict[str, Any]:
    model = {"n_layers": layers, "d_model": width, "n_heads": 8, "n_kv_heads": 1, "head_dim": 64, "vocab_size": 50_304}
    return {"model": model, "context_length": context, "micro_batch": micro_batch, "dtype": "bfloat16"}


_TINY = {
    "model": {"n_layers": 2, "d_model": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 64, "vocab_size": 512},
    "context_length": 64,
    "micro_batch": 1,
    "dtype": "bfloat16",
}

SIZES = {
    "device": Sizes(
        matmul=8192,
        copy_bytes=2**30,
        look=(16_384,),
        rest=(  # those of most interest first; the first look has 16K, 8/1, 64
            (4096, (8, 1), 64),
            (16_384, (8, 1), 128),
            (16_384, (32, 8), 64),
            (16_384, (32, 8), 128),
            (4096, (8, 1), 128),
            (4096, (32, 8), 64),
            (4096, (32, 8), 128),
        ),
        documents=(32_768, (1, 4, 32)),
        scan=16_384,
        races=(4096, 8192),
        race_heads=((8, 1), (32, 8)),
        runs=30,
        correct_lengths=(200, 1000, 64, 65, 1, 192),
        correct_heads=((8, 1), (32, 8), (1, 1), (8, 2), (12, 4)),
        correct_dims=(64, 128),
        correct_kinds=KINDS,
        decode=((8, 16_384), (1, 131_072), (8, 131_072), (1, 16_384)),
        decode_heads=((8, 1), (32, 8)),
        training={"470M": _paper(24, 1280), "1.2B": _paper(36, 1536), "3M": _paper(4, 256)},
        main="470M",
        small="3M",
        repeats=10,
        processes=(1, 4, 2),
        steps=3,
        agreement=10,
        variants=(
            ("470M", "none", "cudnn"),
            ("1.2B", "attention_only", "cudnn"),
            ("3M", "none", "cudnn"),
            ("470M", "attention_only", "pallas_gpu"),
            ("470M", "none", "pallas_gpu"),
            ("470M", "dots", "cudnn"),
            ("470M", "attention_only", "pallas_triton"),
        ),
    ),
    "rehearse": Sizes(
        matmul=256,
        copy_bytes=2**22,
        look=(64,),
        rest=((64, (2, 1), 64),),
        documents=(64, (2,)),
        scan=64,
        races=(64,),
        race_heads=((2, 1),),
        runs=2,
        correct_lengths=(65,),
        correct_heads=((2, 1),),
        correct_dims=(64,),
        correct_kinds=KINDS,
        decode=((1, 128),),
        decode_heads=((2, 1),),
        training={"tiny": _TINY},
        main="tiny",
        small="tiny",
        repeats=3,
        processes=(1, 2),
        steps=1,
        agreement=2,
        variants=(("tiny", "none", "cudnn"), ("tiny", "attention_only", "pallas_triton")),
    ),
}
SIZES["compile_only"] = SIZES["device"]


def one_of_each(sizes: Sizes) -> Sizes:
    """The first of everything that there are several of: a program or two for each step."""
    first = {name: value[:1] for name, value in sizes._asdict().items() if isinstance(value, tuple) and name != "documents"}
    length, documents = sizes.documents
    return sizes._replace(**first, documents=(length, documents[:1]))
