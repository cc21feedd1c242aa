"""The folder of a report: the page, and its tables as Markdown and LaTeX."""

from __future__ import annotations

from etils import epath

from gqa_jax import storage
from launch.report import document, sections
from launch.report.findings import Findings


def write(folder: epath.Path, findings: Findings) -> epath.Path:
    """Writes index.html, and NAME.md and NAME.tex of every table, into a folder; returns the path of the page.

    Each file is whole or not there, and the page comes last. The folder may be on local disk or on gs://.
    """
    parts = sections.parts(findings)
    html = document.render(findings, parts)
    folder.mkdir(parents=True, exist_ok=True)
    for table in sections.tables_of(parts):
        storage.write_bytes(folder / f"{table.name}.md", table.markdown().encode())
        storage.write_bytes(folder / f"{table.name}.tex", table.latex().encode())
    storage.write_bytes(folder / "index.html", html.encode())
    return folder / "index.html"
