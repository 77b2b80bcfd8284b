"""Recipes: one file is one experiment. `--config=configs/FILE.py[:METHOD]`."""
