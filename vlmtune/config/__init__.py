"""Typed settings: flags, parsing, limits, YAML."""
