"""Several processes that train one model: who they are, and what they sum and tell each other."""
