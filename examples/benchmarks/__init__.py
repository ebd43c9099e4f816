"""Scripts behind every published measurement."""
