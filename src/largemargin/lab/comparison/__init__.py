"""A comparison: what is compared, which lambda is chosen, and the tables and the page that say what came of it."""
