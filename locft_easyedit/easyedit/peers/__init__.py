"""EasyEdit's own methods, on any model."""
