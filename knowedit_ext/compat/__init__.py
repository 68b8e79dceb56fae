"""Drop-ins: other editing libraries run on us, unchanged (docs/dropin.md). Built on the public API alone."""
