"""Does it work? Judges of the picture world, and the gates a base must pass before anything is measured on it."""
