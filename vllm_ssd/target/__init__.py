"""The target's half: everything that runs in vLLM's worker."""
