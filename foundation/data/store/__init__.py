"""Datasets into one harmonised, chunked store: `universal-ct prepare`.

`harmonise` turns one scan and its labels into the store's frame and classes; `sides` and `body`
tell left from right for it; `store` writes and reads cases; `prepare` runs over datasets. Import
from these modules: this one stays empty, so that reading a store imports no more than it needs.
"""
