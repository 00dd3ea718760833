"""What a finished run can be written as: one module for each format, found by its name."""
