"""Changes to a model in memory: more classes, and low-rank adapters (LoRA).

`classes` adds classes by their prompts. `adapters` adds, switches, merges and deletes adapters with
the classes that go with them. `low_rank` puts peft's layers into networks. Files of adapters are
written and read by `foundation.hub.adapter_files`.
"""
