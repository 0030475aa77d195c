"""The tiny run, as the trainer's tests have it."""

from tiny_run import data_folder, recipe_file, run_folder

__all__ = ["data_folder", "recipe_file", "run_folder"]
