"""A run: from a configuration and tokens to result.json."""
