"""Recipes that make the published models."""
