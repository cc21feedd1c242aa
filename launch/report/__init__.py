"""The report of a grid: one HTML file with the answer, its certainty and an explorer; tables as Markdown and LaTeX beside it.

from launch import report
report.write(folder, findings)        # index.html, and tables beside it
"""

from launch.report.document import page, write
from launch.report.findings import Findings, Picture, Study

__all__ = ["Findings", "Picture", "Study", "page", "write"]
