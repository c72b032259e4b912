"""The command line: one file a verb, with its options (`add_arguments`) and what it does (`run`).

`main` puts the verbs together; `shared` holds what several of them need.
"""
