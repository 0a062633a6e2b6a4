"""The `sglang-ext` command: compare, doctor, serve."""
