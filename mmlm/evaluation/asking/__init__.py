"""Who answers, and how: a model of ours, vLLM, or an address; every answer on the disk at once.

    plan ──► ask ──► backend | vllm_backend | endpoint ──► answers.jsonl

`backend` holds what a backend promises; `shared_prefix` reads a picture once for all its
questions, `processes` shares the items among processes, `answers` keeps them.
"""
