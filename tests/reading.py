"""Inputs read in one call, for tests of their formats."""

from gqa_jax.data.documents import Format, Reading, find_sources, read_documents


def read(*inputs, include="*", exclude=None, **form):
    """All documents of inputs, and what was counted."""
    reading, sources = Reading(), find_sources(inputs, include, exclude).sources
    return [document for source in sources for document in read_documents(source, Format(**form), reading)], reading


def texts(*inputs, **options):
    return [document.text for document in read(*inputs, **options)[0]]
