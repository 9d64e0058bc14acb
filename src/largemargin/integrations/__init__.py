"""The losses under other people's training loops: a module for each framework, which nothing else imports."""
