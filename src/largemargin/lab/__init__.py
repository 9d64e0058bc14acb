"""The experiment tool: the same network under several losses and seeds, on the same data (``pip install "largemargin[lab]"``)."""

# installed by largemargin[lab]
NEEDED = (
    *("jsonargparse", "rich", "sklearn", "scipy", "matplotlib", "jinja2", "torchvision", "PIL"),
    *("accelerate", "safetensors", "tensorboard"),
)
