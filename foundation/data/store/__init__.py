"""Datasets into one harmonised, chunked store: `universal-ct prepare`.

    prepare, processes    run over whole datasets, in parallel
    harmonise             turns one scan and its labels into the store's frame and classes
    writing, arrays       write a case; read any part of it
    manifest              the cases of a store and the hashes of their files
    checking              is a store as it was written?

Import from these modules: this one stays empty, so that reading a store imports no more than it
needs.
"""
