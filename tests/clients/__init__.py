"""Real clients of the venue, each a program of its own, with nothing changed but base URLs."""
