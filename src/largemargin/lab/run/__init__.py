"""One run: a recipe, what it trains with, the loop, and what it leaves in its folder."""
