"""What the doctests of the package leave out."""

collect_ignore = ["largemargin/integrations/lightning.py"]  # needs lightning; tests/test_integrations_lightning.py runs its examples
