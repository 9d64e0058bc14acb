"""What can be typed after ``largemargin``: options, their types and their help."""
