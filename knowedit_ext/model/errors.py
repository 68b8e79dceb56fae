"""What is wrong with a model or its numbers, for people."""


class UnsupportedModelError(ValueError):
    """The model is not one whose parts we know; the message names what is missing."""


class CannotRunError(UnsupportedModelError, RuntimeError):
    """The model's own forward pass fails."""


class NotFiniteError(FloatingPointError, ValueError):
    """Numbers became NaN or infinite: of a model, or of what was trained."""
