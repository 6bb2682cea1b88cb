"""What happens to a row, in the order it happens. Imports schemas, never jobs."""
