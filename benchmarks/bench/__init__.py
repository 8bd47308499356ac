"""`glimpse bench`: systems side by side under load, in one run."""
