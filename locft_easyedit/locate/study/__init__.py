"""The study of places: a grid of cells, measured one after the other."""
