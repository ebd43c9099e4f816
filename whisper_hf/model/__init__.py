"""The model and its attention: exactly the files that are saved with a checkpoint.

transformers copies them by following imports of the form `from .sibling`, so all files lie flat in this folder and
import one another in that form alone.
"""
