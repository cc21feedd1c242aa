"""Generation: prompts read in chunks, tokens drawn in a loop on the device, a trained model to use (docs/generation.md)."""
