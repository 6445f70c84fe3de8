"""What is asked: the YAML of a benchmark, its rows, and the conditions they are asked in.

    schema, tables, pictures ──► items ──► benchmark ──► conditions ──► plan ──► asking

To add a benchmark, write a YAML into `eval/benchmarks/`; `schema` says which keys there are.
"""
