"""What to run: algorithms as dataflow graphs and pure functions, recipes, data preparation."""
