"""Tables of a report are those of `launch.tables`."""

from launch.tables import Column, Table

__all__ = ["Column", "Table"]
