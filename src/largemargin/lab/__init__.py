"""The experiment tool: the same network under several losses and seeds, on the same data (``pip install "largemargin[lab]"``)."""

# installed by largemargin[lab]
NEEDED = (
    *("jsonargparse", "rich", "sklearn", "scipy", "matplotlib", "jinja2", "torchvision", "PIL"),
    *("accelerate", "safetensors", "tensorboard"),
)

# of these, what a command does without
SPARED = {"reproduce": ("sklearn", "tensorboard")}
