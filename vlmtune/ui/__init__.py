"""The page of a search, while it runs and afterwards: a small server on loopback."""
