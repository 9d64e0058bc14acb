"""The experiment tool: the same network under several losses and seeds, on the same data (``pip install "largemargin[lab]"``)."""
