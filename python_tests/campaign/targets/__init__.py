"""The public doors, each as a function `(random, folder) -> Case`: one malformed input and what it goes through.

A new door is a function here and its name in its module's DOORS.
"""

from . import arguments, commands, data, edits, folders, interrupted, prompts

DOORS = {
    door.__name__: door
    for module in (prompts, data, arguments, edits, folders, interrupted, commands)
    for door in module.DOORS
}
