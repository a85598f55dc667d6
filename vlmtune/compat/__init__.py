"""Every private or experimental API of another library that vlmtune uses, one module per library.

Nothing else in vlmtune reads a name with a leading underscore of another library (`tests/test_compat.py`
holds this). Each module names the version that it was tried on, and each function says why no public API can
take its place. Its test fails in plain words when the API has moved.
"""
