"""Every private or experimental API of another library that vlmtune uses, one module per library.

Nothing else in vlmtune reads a name with a leading underscore of another library (`tests/test_compat.py`
holds this). Each function says which version it was tried on and why no public API does; its test fails in
plain words when the API has moved.
"""
