"""How sure a score is: resamples, redrawn labels, intervals, noise floors and comparisons."""
