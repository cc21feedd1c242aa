"""Where cells run: an engine a module, all behind `base`."""
