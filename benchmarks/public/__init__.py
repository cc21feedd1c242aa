"""Public measurements of other people's software, and the shapes that they are of."""
