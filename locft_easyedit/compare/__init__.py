"""`locft compare`: LocFT-BF beside EasyEdit's own methods, on one model and the same edits."""
