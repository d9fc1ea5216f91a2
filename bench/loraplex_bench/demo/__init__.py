"""The embedded demo model: text transformations, each with one right answer, and the trained weights."""
