"""From logits, or features, to the statistics of rows, and from these to a loss; docs/architecture.md says what each file does."""
