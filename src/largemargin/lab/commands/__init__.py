"""The commands: each orchestrates the rooms below it."""
