"""Sample files and tiny models for a first look and for the tests."""
