"""The commands of `knowedit`, one a file."""
