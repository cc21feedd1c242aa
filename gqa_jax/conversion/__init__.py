"""Models as others write them: Hugging Face's folders, out and in."""
