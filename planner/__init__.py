"""Which plan: candidates, simulator, search, explanations."""
