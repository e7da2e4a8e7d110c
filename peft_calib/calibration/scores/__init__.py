"""Every score is a function of sufficient statistics, or of rows, here; so is the one table of what there is."""
