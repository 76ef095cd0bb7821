"""Demo data: counterfactual edits about well-known things, written for this project."""
