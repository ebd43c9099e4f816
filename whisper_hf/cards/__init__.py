"""Model cards and the results files from which they take their numbers."""
