"""One run of a training function of the user's own: what it is told, what it may return, and what is kept of it."""
