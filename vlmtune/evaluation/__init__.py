"""Answers generated for held-out rows, what they are worth, and adapters made ready for others to use."""
