"""The scripts that make, measure and describe the published models."""
