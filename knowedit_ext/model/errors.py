"""What is wrong with a model, for people."""


class UnsupportedModelError(ValueError):
    """The model is not one whose parts we know; the message names what is missing."""
