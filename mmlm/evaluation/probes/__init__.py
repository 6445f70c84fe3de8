"""What the parts know without the whole: the frozen encoder, its neighbours, the LLM's layers."""
