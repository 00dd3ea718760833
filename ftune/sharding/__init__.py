"""A model split over ranks: each holds its rows of every weight, gathers a layer while it runs, and moves its rows."""
