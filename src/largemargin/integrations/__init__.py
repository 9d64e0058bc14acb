"""The losses in other training frameworks: one module for each, which nothing else imports."""
