"""The experiments of docs/results: what is run (plan.yaml), by the recipes, and its figures."""
