"""The draft's half: a process of its own that speculates while the target verifies."""
