"""A classifier whose classes are split over the ranks of a process group, and a function that gathers rows from them."""
