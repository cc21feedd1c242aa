"""Text to a token store (`prepare`), the store (`store`), and the store to batches (`reader`)."""
