"""Scaling-law studies of grouped-query attention at long context."""
